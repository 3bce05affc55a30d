"""Faces of other libraries over weightlift's reading, for programs that are written against those."""
