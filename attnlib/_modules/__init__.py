"""The attention modules without their storage: their calls, which Flax linen and Flax NNX share."""
