"""The parts of the page, one file each; every ``render`` draws with Streamlit and returns what it learned."""
