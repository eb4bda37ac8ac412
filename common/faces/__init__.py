"""Faces as training data: reading photographs, drawn stand-ins, and the data set both become."""

from common.faces.dataset import FaceDataset, FaceOptions
from common.faces.gallery import Reading, SkippedImages
from common.faces.loading import load_faces, read_faces
from common.faces.procedural import procedural_faces

__all__ = [
    "FaceDataset",
    "FaceOptions",
    "Reading",
    "SkippedImages",
    "load_faces",
    "procedural_faces",
    "read_faces",
]
