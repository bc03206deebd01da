"""The communication domain of one epoch: transports behind one dispatch, left without the dead."""
