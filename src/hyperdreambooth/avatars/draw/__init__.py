"""The drawing of an avatar: who somebody is, how it looks, and the picture of it."""
