"""Quality of images: metrics, and what is drawn to compute them."""
