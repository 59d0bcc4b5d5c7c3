"Rectangles as masks, and masks as COCO's run lengths."
import numpy as np
from pycocotools import mask as rle


def packed(m):
    r = rle.encode(np.asfortranarray(m, np.uint8))
    return {'size': r['size'], 'counts': r['counts'].decode()}


def rectangle(size, x0, y0, x1, y1):
    "1 in the rectangle, of an image of (height, width)."
    m = np.zeros(size, np.uint8)
    m[y0:y1, x0:x1] = 1
    return m
