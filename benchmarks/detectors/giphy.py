"""GIPHY's celebrity detector on a folder of pictures: a table with the columns file, label, score, one row per person.

    python giphy.py --resources celeb-detection-oss/examples/resources FOLDER TABLE

It runs in the detector's own environment, Python 3.6 with TensorFlow 1: nothing of itd is imported, and no newer syntax used.

Source: github.com/Giphy/celeb-detection-oss, called as by MACE (Lu et al. 2024), metrics/evaluate_by_GCD.py.
"""

import argparse
import csv
import os
import sys
from pathlib import Path

WEIGHTS = "face_recognition/best_model_states.pkl"
FILES = (*(f"face_detection/det{i}.npy" for i in (1, 2, 3)), "face_recognition/labels.csv", WEIGHTS)
FACE_MARGIN, FACE_SIZE = 0.2, 224
"""As GIPHY's example and MACE have them."""
ENDINGS = (".png", ".jpg", ".jpeg")


class Giphy:
    """Tells who is in a picture.

    Raises:
        FileNotFoundError: the folder of the models lacks a file.
        ImportError: the package is not installed here.
    """

    def __init__(self, resources: Path) -> None:
        missing = [name for name in FILES if not (resources / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{resources} lacks {', '.join(missing)}: examples/download_model.py fetches the folder")
        os.environ["APP_RECOGNITION_WEIGHTS_FILE"] = WEIGHTS  # read by FaceRecognizer
        try:
            from model_training.helpers.face_recognizer import FaceRecognizer
            from model_training.helpers.labels import Labels
            from model_training.preprocessors.face_detection.face_detector import FaceDetector
            from model_training.utils import preprocess_image
            from skimage import io
        except ImportError as error:
            raise ImportError(f"celeb-detection-oss is not installed in {sys.executable}: {error}") from error
        folder = str(resources)
        self.read, self.crop = io.imread, preprocess_image
        self.detector = FaceDetector(folder, margin=FACE_MARGIN)
        self.recognizer = FaceRecognizer(Labels(folder), folder, top_n=1)

    def look(self, file: Path) -> list:
        """Return name and probability of every person's likeliest celebrity; the detector joins faces that it takes for one."""
        faces = [self.crop(face, FACE_SIZE) for face, _ in self.detector.perform_single(self.read(str(file)))]
        return [(name_of(label), float(score)) for ((label, score), *_), _ in self.recognizer.perform(faces)]


def name_of(label: object) -> str:
    """Return the name in a label: Brad Pitt for Brad_Pitt_[m.0c6qh]."""
    return str(label).split("_[")[0].replace("_", " ")


def main(argv: list) -> None:
    """Write the table; stop with a line on stderr where the detector cannot run."""
    parser = argparse.ArgumentParser(description="Tell which celebrities are in the pictures of a folder.")
    parser.add_argument("--resources", type=Path, required=True, help="folder of GIPHY's models")
    parser.add_argument("folder", type=Path, help="folder of pictures")
    parser.add_argument("table", type=Path, help="CSV file to write")
    arguments = parser.parse_args(argv)
    try:
        giphy = Giphy(arguments.resources)
        pictures = sorted(path for path in arguments.folder.iterdir() if path.suffix in ENDINGS)
        with arguments.table.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["file", "label", "score"])
            for picture in pictures:
                rows.writerows([picture.name, *person] for person in giphy.look(picture))
    except (ImportError, OSError) as error:
        sys.exit(f"giphy.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
