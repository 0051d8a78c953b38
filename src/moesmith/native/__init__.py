"""Define the models of moesmith's own format, in files that go with the weights: torch and transformers only.

``export/native.py`` copies these files next to the weights, so that the folder loads with ``trust_remote_code=True``
where moesmith is not installed; their imports of each other are relative. Where it is installed,
``import moesmith.native.modeling`` registers the same classes.
"""
