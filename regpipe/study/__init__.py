"""The comparison of backbones, the study, their pages and figures."""
