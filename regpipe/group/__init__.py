"""More than two images at once: the template of a group, and each subject's transform to it."""
