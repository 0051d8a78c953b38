"""What a run did, to look at: the routing recorder, the figures and the HTML page."""
