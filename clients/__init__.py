"""The Flower side of a site: the ClientApp and what a site keeps on its disk."""
