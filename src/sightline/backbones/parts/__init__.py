"""What several families share: the base of every network, and the DeiT, PVT, Swin and CSwin skeletons."""
