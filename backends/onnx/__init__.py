"""ONNX models on onnxruntime."""
