"""Files and folders as the world delivers them: broken, full, forbidden, malicious.

The rule under test: bad input is an `InputError` that names the file; nothing else escapes, nothing half-written stays,
and a batch finishes the good and returns the bad."""
import io
import os
import pickle
import struct
import sys
import subprocess
import textwrap
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from wsss_nb.data.items import InputError, Item, atomic, images_in, read_image, read_mask, write_mask
from wsss_nb.data.store import LabelStore, Maps, MapStore, for_each

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (40, 50, 3), np.uint8)
MASK = RNG.integers(0, 3, (40, 50), np.uint8)
fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_bytes(save):
    f = io.BytesIO()
    save(f)
    return f.getvalue()


FILES = {kind: as_bytes(partial(Image.fromarray(PHOTO).save, format=kind)) for kind in ('PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP', 'GIF')}


def refused(read, path, name=None):
    "`read(path)` gives a result or an `InputError` that names the file; returns the result."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: return read(path)
        except InputError as e: assert (name or Path(path).name) in str(e) and e.remedy


# --- images and masks that cannot be read ---

@pytest.mark.parametrize('read', [read_image, read_mask])
@pytest.mark.parametrize('content', [b'', b'\0' * 500, b'hello', b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff\xe0', b'<svg xmlns="http://www.w3.org/2000/svg"/>',
                                     b'%PDF-1.4', b'GIF89a', b'RIFF\0\0\0\0WEBP', b'BM', pickle.dumps({1: 2})])
def test_not_an_image(tmp_path, read, content):
    f = tmp_path / 'photo 7.png'
    f.write_bytes(content)
    with pytest.raises(InputError, match=r'photo 7\.png') as e: read(f)
    assert e.value.remedy and e.value.path == str(f)


@pytest.mark.parametrize('read', [read_image, read_mask])
def test_missing_folder_or_device_in_place_of_a_file(tmp_path, read):
    with pytest.raises(InputError, match=r'gone\.png: no such'): read(tmp_path / 'gone.png')
    (tmp_path / 'folder.png').mkdir()
    with pytest.raises(InputError, match=r'folder\.png'): read(tmp_path / 'folder.png')
    (tmp_path / 'dangling.png').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(InputError, match=r'dangling\.png'): read(tmp_path / 'dangling.png')
    os.mkfifo(tmp_path / 'pipe.png')                   # must not wait for a writer for ever
    with pytest.raises(InputError, match=r'pipe\.png'): read(tmp_path / 'pipe.png')


@fuzz
@given(st.sampled_from(sorted(FILES)), st.floats(0, 1, exclude_max=True))
def test_cut_short_anywhere(tmp_path, kind, share):
    "Whole or refused: a truncated photo is never returned with grey where its end was."
    f = tmp_path / 'cut.img'
    content = FILES[kind]
    f.write_bytes(content[:int(len(content) * share)])
    got = refused(read_image, f)
    if got is not None:
        f.write_bytes(content)
        np.testing.assert_array_equal(got, read_image(f))


@fuzz
@given(st.sampled_from(sorted(FILES)), st.data())
def test_bytes_changed_anywhere(tmp_path, kind, data):
    content = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    f = tmp_path / 'changed.img'
    f.write_bytes(content)
    got = refused(read_image, f)
    assert got is None or (got.dtype == np.uint8 and got.ndim == 3 and got.shape[2] == 3)
    got = refused(read_mask, f)
    assert got is None or (got.dtype == np.uint8 and got.ndim == 2)


@fuzz
@given(st.binary(max_size=300))
def test_any_bytes_at_all(tmp_path, content):
    f = tmp_path / 'any.png'
    f.write_bytes(content)
    refused(read_image, f)
    refused(read_mask, f)


def png_of_claimed_size(w, h):
    def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    header = struct.pack('>IIBBBBB', w, h, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0' * 1000)) + chunk(b'IEND', b'')


@pytest.mark.parametrize('read', [read_image, read_mask])
def test_decompression_bomb(tmp_path, read):
    "A kilobyte that claims four billion pixels is refused before memory is taken."
    (tmp_path / 'bomb.png').write_bytes(png_of_claimed_size(65_000, 65_000))
    with pytest.raises(InputError, match=r'bomb\.png'): read(tmp_path / 'bomb.png')


@pytest.mark.parametrize('read', [read_image, read_mask])
def test_header_without_its_pixels(tmp_path, read):
    (tmp_path / 'thin.png').write_bytes(png_of_claimed_size(3000, 3000))
    with pytest.raises(InputError, match=r'thin\.png'): read(tmp_path / 'thin.png')


# --- folders ---

def test_missing_and_empty_folder(tmp_path):
    with pytest.raises(InputError, match='nowhere: no such folder'): images_in(tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError, match='empty: no image'): images_in(tmp_path / 'empty')
    (tmp_path / 'empty' / 'notes.txt').write_text('x')
    with pytest.raises(InputError, match='empty: no image'): images_in(tmp_path / 'empty')
    with pytest.raises(InputError, match=r'notes\.txt'): images_in(tmp_path / 'empty' / 'notes.txt')


def test_two_files_of_one_stem(tmp_path):
    for n in ('cat.jpg', 'dog.jpg', 'cat.png'): Image.fromarray(PHOTO).save(tmp_path / n)
    with pytest.raises(InputError) as e: images_in(tmp_path)
    assert 'cat.jpg' in str(e.value) and 'cat.png' in str(e.value) and 'rename' in str(e.value)


# --- writing where one cannot ---

def writers(folder):
    return {'maps': lambda: MapStore(folder).save('cat', Maps([1], np.ones((1, 50, 50)))),
            'labels': lambda: LabelStore(folder).save('cat', MASK), 'mask': lambda: write_mask(folder / 'cat.png', MASK)}


@pytest.mark.parametrize('what', ['maps', 'labels', 'mask'])
def test_a_file_stands_where_the_folder_should(tmp_path, what):
    (tmp_path / 'out').write_text('I am a file')
    with pytest.raises(InputError, match='out'): writers(tmp_path / 'out')[what]()
    with pytest.raises(InputError, match='out'): writers(tmp_path / 'out' / 'deeper')[what]()
    assert (tmp_path / 'out').read_text() == 'I am a file'


@pytest.mark.parametrize('what', ['maps', 'labels', 'mask'])
def test_folder_without_write_permission(tmp_path, what):
    "Skipped only where the user may write anything (root); the case above and those below need no permission."
    folder = tmp_path / 'locked'
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK): pytest.skip('this user may write into read-only folders')
    with pytest.raises(InputError, match='locked'): writers(folder)[what]()


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='only root can become another user')
def test_folder_without_write_permission_as_another_user(tmp_path):
    "The same for root, in a child that gives up its rights after the imports."
    (tmp_path / 'locked').mkdir(mode=0o555)
    for p in (tmp_path, *tmp_path.parents):
        if p == Path('/tmp'): break
        p.chmod(p.stat().st_mode | 0o055)
    r = child(f"""
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        for name, write in writers(Path({str(tmp_path / 'locked')!r})).items():
            try: write(); print(name, 'wrote')
            except InputError as e: print(name, 'refused', 'locked' in str(e))""")
    assert r.stdout.split('\n')[:3] == ['maps refused True', 'labels refused True', 'mask refused True'], r.stdout + r.stderr


def child(code):
    "Run code in a Python of its own that has imported this file."
    head = f"import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_hostile import *\n"
    return subprocess.run([sys.executable, '-c', head + textwrap.dedent(code)], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(sys.platform != 'linux', reason='uses RLIMIT_FSIZE')
def test_full_disk(tmp_path):
    "A write fails half way (file size limit, which stands in for a full disk): no half file, the old one unharmed, the file named."
    out = tmp_path / 'out'
    for write in writers(out).values(): write()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    r = child(f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        for name, write in writers(Path({str(out)!r})).items():
            try: write(); print(name, 'wrote')
            except InputError as e: print(name, 'refused', 'cat.' in str(e) and 'space' in str(e))""")
    assert r.stdout.split('\n')[:3] == ['maps refused True', 'labels refused True', 'mask refused True'], r.stdout + r.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize('number', ['ENOSPC', 'EDQUOT', 'EROFS', 'EACCES', 'EIO'])
def test_rename_fails(tmp_path, monkeypatch, number):
    import errno

    def fails(*a): raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
    store = MapStore(tmp_path)
    store.save('cat', Maps([1], np.zeros((1, 2, 2))))
    before = store.path('cat').read_bytes()
    monkeypatch.setattr(os, 'replace', fails)
    with pytest.raises(InputError, match=r'cat\.npz: cannot be written'): store.save('cat', Maps([1], np.ones((1, 2, 2))))
    assert [p.name for p in tmp_path.iterdir()] == ['cat.npz'] and store.path('cat').read_bytes() == before


def test_interrupted_by_the_keyboard(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with atomic(tmp_path / 'x.npz') as tmp:
            tmp.write_bytes(b'half')
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_run_are_not_results(tmp_path):
    "What SIGKILL leaves behind (a temporary file) counts neither as done nor as an image."
    store = MapStore(tmp_path)
    r = child(f"""
        import signal
        with atomic(MapStore(Path({str(tmp_path)!r})).path('cat')) as tmp:
            tmp.write_bytes(b'half')
            os.kill(os.getpid(), signal.SIGKILL)""")
    assert r.returncode == -9 and len(list(tmp_path.iterdir())) == 1
    assert 'cat' not in store and store.ids() == []
    Image.fromarray(PHOTO).save(tmp_path / 'a.png')
    (tmp_path / '.b.123.abc.png').write_bytes(b'half')
    assert [p.name for p in images_in(tmp_path)] == ['a.png']


# --- ids that want out ---

@pytest.mark.parametrize('store', [MapStore, LabelStore])
@pytest.mark.parametrize('id', ['../cat', '/etc/passwd', 'a/b', '..', '.', '', '.hidden', '../../x', 'a/../../b', 'a\0b', 'x' * 300])
def test_path_traversal(tmp_path, store, id):
    s = store(tmp_path / 'deep' / 'store')
    value = MASK if store is LabelStore else Maps([1], np.ones((1, 2, 2)))
    for act in (lambda: s.save(id, value), lambda: s.load(id)):
        with pytest.raises(InputError): act()
    assert [p for p in tmp_path.rglob('*') if p.is_file()] == []


def test_a_bad_id_does_not_stop_the_batch(tmp_path):
    labels = LabelStore(tmp_path)
    items = [Item(i, tmp_path / 'x.png') for i in ('a', '../b', 'c')]
    bad = for_each(partial(save_mask, labels=labels), items, done=lambda o: o.id in labels, workers=1)
    assert [i for i, _ in bad] == ['../b'] and labels.ids() == ['a', 'c']


def save_mask(item, labels): labels.save(item.id, MASK)


# --- map files made to harm ---

class Bang:
    def __reduce__(self): return os.mkdir, (str(Bang.where),)


def test_pickles_are_not_opened(tmp_path):
    Bang.where = tmp_path / 'was_run'
    store = MapStore(tmp_path)
    trap = np.empty(1, object)
    trap[0] = Bang()
    np.savez(store.path('values'), keys=np.array([1]), values=trap)
    np.savez(store.path('keys'), keys=trap, values=np.ones((1, 2, 2)))
    store.path('raw').write_bytes(pickle.dumps(Bang()))
    with zipfile.ZipFile(store.path('zip'), 'w') as z: z.writestr('keys.npy', pickle.dumps(Bang())), z.writestr('values.npy', pickle.dumps(Bang()))
    for i in ('values', 'keys', 'raw', 'zip'):
        with pytest.raises(InputError, match=rf'{i}\.npz'): store.load(i)
    assert not Bang.where.exists()


@pytest.mark.parametrize('arrays', [{}, dict(keys=[1]), dict(keys=[1, 2], values=np.ones((1, 2, 2))), dict(keys=[1], values=np.ones((2, 2))),
                                    dict(keys=['cat'], values=np.ones((1, 2, 2))), dict(keys=[1], values=np.array([[['x']]]))])
def test_map_files_of_another_content(tmp_path, arrays):
    store = MapStore(tmp_path)
    np.savez(store.path('cat'), **arrays)
    with pytest.raises(InputError, match=r'cat\.npz'): store.load('cat')


def test_a_single_array_in_place_of_an_archive(tmp_path):
    store = MapStore(tmp_path)
    with open(store.path('cat'), 'wb') as f: np.save(f, np.ones((1, 2, 2)))
    with pytest.raises(InputError, match=r'cat\.npz'): store.load('cat')


MAP_FILE = as_bytes(partial(np.savez, keys=np.array([3]), values=np.ones((1, 4, 4), np.float16)))


@pytest.mark.parametrize('length', range(0, len(MAP_FILE), 7))
def test_map_file_cut_short(tmp_path, length):
    store = MapStore(tmp_path)
    store.path('cat').write_bytes(MAP_FILE[:length])
    with pytest.raises(InputError, match=r'cat\.npz'): store.load('cat')


def test_map_file_with_any_one_byte_changed(tmp_path):
    "Every byte, three ways: maps or an InputError, never another error."
    store, other = MapStore(tmp_path), []
    for at in range(len(MAP_FILE)):
        for change in (0x01, 0x80, 0xff):
            content = bytearray(MAP_FILE)
            content[at] ^= change
            store.path('cat').write_bytes(content)
            try: store.load('cat')
            except InputError: pass
            except BaseException as e: other.append((at, change, f'{type(e).__name__}: {e}'))
    assert not other, f'{len(other)} escaped: {other[:8]}'


def test_values_that_are_no_map(tmp_path):
    "NaN in a map is found where it is saved or loaded, not three stages later."
    store = MapStore(tmp_path)
    with pytest.raises((ValueError, InputError)):
        store.save('cat', Maps([1], np.full((1, 2, 2), np.nan)))
        store.load('cat')


# --- batches ---

def copy_image(item, labels): labels.save(item.id, read_image(item.image)[..., 0])


@pytest.mark.parametrize('workers', [1, 2])
def test_batch_finishes_the_good_and_lists_the_bad(tmp_path, workers):
    items = []
    for i in range(12):
        f = tmp_path / f'photo {i}.png'
        f.write_bytes(FILES['PNG'][:None if i % 3 else 200])
        items.append(Item(f.stem, f))
    labels = LabelStore(tmp_path / 'out')
    work = partial(copy_image, labels=labels)
    bad = for_each(work, items, done=lambda o: o.id in labels, workers=workers)
    assert [i for i, _ in bad] == ['photo 0', 'photo 3', 'photo 6', 'photo 9']
    assert all(f'{i}.png' in str(e) for i, e in bad)
    assert len(labels.ids()) == 8
    items[0].image.write_bytes(FILES['PNG'])
    assert [i for i, _ in for_each(work, items, done=lambda o: o.id in labels, workers=workers)] == ['photo 3', 'photo 6', 'photo 9']
    assert 'photo 0' in labels


def fault(item): raise ZeroDivisionError(item.id)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_fault_in_the_program_is_not_bad_input(tmp_path, workers):
    with pytest.raises(ZeroDivisionError): for_each(fault, [Item(i, tmp_path) for i in 'abc'], workers=workers)


def test_errors_cross_processes_whole(tmp_path):
    e = pickle.loads(pickle.dumps(InputError(tmp_path / 'x.png', 'is broken', 'Mend it.')))
    assert isinstance(e, InputError) and e.path.endswith('x.png') and e.remedy == 'Mend it.' and 'is broken' in str(e)
