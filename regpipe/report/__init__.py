"""What people look at: pictures, the QC page, TensorBoard, figures."""
