"""YFCC100M: from its metadata to an index of photos in random order, and from there to photos on disk."""
