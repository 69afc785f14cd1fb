"""One adapter a family over vLLM's layers. Nobody imports the adapters but vLLM, by the names that `families` holds."""
