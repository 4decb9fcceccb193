"""The canonical form, and the rules that bring any graph into it or refuse it."""
