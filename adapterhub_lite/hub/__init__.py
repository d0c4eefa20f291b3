"""The Hugging Face Hub: references to it, and what is fetched from there, verified.

Everything goes through huggingface_hub: its cache, token, endpoint, offline mode and exceptions are everybody's.
"""
