"""A stand-in for torchvision, put on the path for MosaicML Streaming alone.

`import streaming` imports torchvision unconditionally, for image datasets that this bench never
touches. Where torch is the CPU build, the torchvision wheel that pip finds is built for CUDA and
fails on import, so this stub gives the two names that are asked for.
"""
