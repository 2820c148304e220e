"""Results for people: pictures, the QC page, TensorBoard, figures."""
