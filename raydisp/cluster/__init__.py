"""The machines: what they offer, how trials are packed onto them, joining Ray, nodes that come and go."""
