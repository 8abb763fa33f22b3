"""Semantic segmentation with Mobile DeepLabv3 (section 6.3 of the paper)."""
