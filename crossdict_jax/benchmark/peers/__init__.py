"""Files that run under the Python of another library, each handed to serve.py; never imported."""
