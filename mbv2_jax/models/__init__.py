"""MobileNetV2 and nothing else: no module in here imports the rest of the package."""
