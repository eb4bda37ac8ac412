"""Faces as training data: reading photographs, drawn stand-ins, and the data set both become."""

from common.faces.dataset import FaceDataset, FaceOptions
from common.faces.folders import SkippedImages
from common.faces.loading import load_faces
from common.faces.procedural import procedural_faces

__all__ = ["FaceDataset", "FaceOptions", "SkippedImages", "load_faces", "procedural_faces"]
