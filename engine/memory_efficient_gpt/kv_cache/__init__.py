"""The KV cache: which block belongs to whom, the tensors, and their exact geometry."""
