"""Object detection with SSDLite (section 6.2 of the paper)."""
