"""Problems of a folder of images: copies, blank or unrelated images, and doubtful labels."""
