"""Show what a run did: the routing recorder, the figures and the HTML page."""
