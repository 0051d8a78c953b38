"""What travels with the weights in moesmith's own format: torch and transformers only, and relative imports.

``export/native.py`` copies these files beside the weights, so that the folder loads with ``trust_remote_code=True``
where moesmith is not installed. ``import moesmith.native.modeling`` registers the same classes where it is.
"""
