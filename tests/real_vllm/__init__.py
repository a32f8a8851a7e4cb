"""The gateway before real vLLM servers on this CPU: opt-in, `make test-real-vllm`."""
