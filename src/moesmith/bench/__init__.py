"""``moesmith bench``: the dense parent and the MoE in turn, in the runtimes where people run models."""
