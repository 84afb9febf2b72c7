"""DICOM files written with pydicom, for test_readers, test_predictor and test_memory."""

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid


def save_dicom(path, pixels, **tags):
    """Save one slice, ``pixels`` (rows, columns) of uint16 or int16; keywords are tags, and None leaves a tag out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    modality = tags.get("Modality", "MR")
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    usual = {
        "Modality": modality,
        "SeriesInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3",
        "ImagePositionPatient": [0, 0, 0],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [1, 1],
        "SliceThickness": 3.2,
    }
    for tag, value in (usual | tags).items():
        if value is not None:
            setattr(data, tag, value)
    assert pixels.dtype in (np.uint16, np.int16)
    data.PixelData = np.ascontiguousarray(pixels).tobytes()
    data.save_as(path, enforce_file_format=True)


def write_series(folder, volume, spacing):
    """Save a CT series of axial slices, ``volume`` (z, y, x) of int16, whose names are in reverse order of position."""
    for k, plane in enumerate(volume):
        save_dicom(
            folder / f"{len(volume) - k:03d}.dcm",
            plane,
            Modality="CT",
            PixelSpacing=[spacing[1], spacing[2]],
            SliceThickness=spacing[0],
            ImagePositionPatient=[0, 0, float(k * spacing[0])],
            RescaleSlope=1,
            RescaleIntercept=0,
        )
