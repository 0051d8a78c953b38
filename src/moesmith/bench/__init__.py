"""Measure the dense parent and the MoE in turn (``moesmith bench``), in the runtimes where people run models."""
