"The study of boxes: whole commands, no leak, scores against outside references, a user's own boxes."
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from wsss_nb.data.coco import voc_as_coco
from wsss_nb.data.items import VOID, InputError, read_image, write_mask
from wsss_nb.data.store import LabelStore
from wsss_nb.study import boxes
from wsss_nb.study.cli import main
from wsss_nb.study.scenes import scenes_data
from wsss_nb.study.tables import Table


def quiet(text): pass


@pytest.fixture(scope='module')
def first(photos, tmp_path_factory):
    "The first table, by the command line."
    runs = tmp_path_factory.mktemp('runs')
    assert main(['table', 'bana-1', '--profile', 'smoke', '--seed', '0', '--workers', '1', '--data', f'voc={photos}', '-o', str(runs)]) == 0
    return runs


@pytest.fixture
def study(photos, first): return boxes.BoxesStudy(scenes_data(photos), first, boxes.boxes_settings('smoke', seeds=(0,)), quiet, 1)


def only_run(study, **options):
    "The label maps of val, which the first table has made."
    run, = boxes.masks_of(study, boxes.classifiers(study), **options)
    return run


# Commands

def test_rows_of_the_tables(first, photos, capsys):
    rows = Table.load(first/'bana-1-smoke.json').rows.set_index('step')
    n = len((photos/'ImageSets/Segmentation/val.txt').read_text().split())
    assert set(rows.photos) == {f'val, {n}'} and len(rows) == 10
    assert rows.loc['BAP: Y_crf', 'authors'].value == pytest.approx(.792) and rows.loc['both, disputed pixels as background', 'reproduction'].value == pytest.approx(.727)
    assert rows.loc['boxes filled', 'spread'] is None and rows.loc['both, disputed pixels left out', 'labelled'] < 1
    assert (first/'bana-1-smoke.jpg').stat().st_size > 1000
    assert main(['table', 'bana-3', '--profile', 'smoke', '--seed', '0', '--workers', '1', '--data', f'voc={photos}', '-o', str(first)]) == 0
    said = capsys.readouterr().out
    assert 'bap: reused' in said and 'true masks of' in said
    t = Table.load(first/'bana-3-smoke.json').rows.set_index('network taught by')
    assert 'authors, before' not in t and t.loc['noise-aware loss', 'authors, after'].value == pytest.approx(.681)


@pytest.mark.parametrize('arguments, says', [
    (['table', 'bana-1', '--data', 'pets=x'], 'NAME is one of voc, coco'),
    (['table', 'bana-2', '--data', 'voc=/nowhere'], 'no such folder'),
    (['table', 'bana-1', '--profile', 'paper'], '--data voc=FOLDER'),
    (['table', 'bana-1', '--profile', 'paper', '--data', 'voc=/nowhere'], 'no such folder'),
    (['segment', '/nowhere', '--boxes', 'x'], 'no such folder'),
])
def test_bad_arguments(arguments, says, capsys, tmp_path):
    assert main([*arguments, '-o', str(tmp_path)]) == 1
    assert says in capsys.readouterr().err


def test_photos_without_boxes(photos, tmp_path):
    shutil.copytree(photos, tmp_path/'VOC2012')
    for p in (tmp_path/'VOC2012/Annotations').iterdir(): p.unlink()
    with pytest.raises(InputError, match='tags'): boxes.BoxesStudy(scenes_data(tmp_path/'VOC2012'), tmp_path, boxes.boxes_settings('smoke'), quiet)


# Scores against outside references, and no leak

def test_scores_are_scikit_learns(study):
    run = only_run(study)
    crf, ret = (LabelStore(run/w) for w in ('crf', 'ret'))
    d, ids = study.dataset, study.boxes.ids
    truth = np.concatenate([d.read_truth(d[i]).ravel() for i in ids])
    y = {k: np.concatenate([s.load(i).ravel() for i in ids]) for k, s in (('crf', crf), ('ret', ret))}
    def miou(known, pred): return jaccard_score(truth[known], pred[known], average='macro')
    known = truth != VOID
    assert boxes.score_labels(study, 'x', [crf]).results[0].row()['mIoU'].value == pytest.approx(miou(known, y['crf']))
    both = boxes.agreement(ids, crf, ret)
    same = known & (y['crf'] == y['ret'])
    assert boxes.score_labels(study, 'x', [both], known=True).results[0].row()['mIoU'].value == pytest.approx(miou(same, y['crf']))
    assert boxes.score_labels(study, 'x', [both]).results[0].row()['mIoU'].value == pytest.approx(miou(known, np.where(y['crf'] == y['ret'], y['crf'], 0)))


def test_no_mask_is_needed_and_nothing_is_random(study, photos, first, tmp_path):
    "Without any mask of a training photo on the disk, and in another folder of runs: the same label maps, bit for bit."
    shutil.copytree(photos, tmp_path/'VOC2012')
    for i in study.train.ids: (tmp_path/'VOC2012/SegmentationClass'/f'{i}.png').unlink()
    other = boxes.BoxesStudy(scenes_data(tmp_path/'VOC2012'), tmp_path/'runs', study.s, quiet, 1)
    a, b = only_run(study), only_run(other)
    for w in ('crf', 'ret'):
        for i in study.boxes.ids: assert (LabelStore(a/w).load(i) == LabelStore(b/w).load(i)).all()


def test_the_grid_is_the_classifiers_alone(study):
    "Another grid is another classifier; what the label maps are made with has no grid."
    four, two = (boxes.classifiers(study, grid=g)[0] for g in (4, 2))
    assert four.hash != two.hash and four.hash == boxes.classifiers(study)[0].hash
    masks = [boxes.box_masks_stage(study.root, study.boxes, replace(study.s, grid=g), four, quiet, 1) for g in (4, 2)]
    assert masks[0].hash == masks[1].hash


def test_published_training(study, tmp_path, monkeypatch):
    "VGG-16 and SGD, with random weights in place of the download: label maps, and a network of each kind."
    monkeypatch.setattr(boxes, 'load_vgg', lambda net: None)
    s = replace(study.s, box_train='paper', backbone='vgg16', segment_train='paper', segment_lr=1e-3)
    data = study.train.keep(lambda o: o.id in set(study.train.ids[:4]))
    net = boxes.box_classifier_stage(tmp_path, data, s, 'x', quiet)
    masks = boxes.box_masks_stage(tmp_path, data, s, net, quiet, 1)
    assert boxes.box_network(s, net).head.weight.shape == (21, 1024, 1, 1) and len(LabelStore(masks/'crf')) == 4
    assert net.config['box_train'] == 'paper'
    run = boxes.segment_stage(tmp_path, data, s, boxes.both_readers(masks), masks.hash, quiet, **boxes.loss_options(s, 'nal'))
    assert run.config['train'] == 'train_as_published' and (run/'model/model.json').is_file()


def test_boxes_filled_are_the_boxes(study):
    filled = boxes.boxes_filled(study.boxes)
    for o in study.boxes:
        m = filled.load(o.id)
        inside = np.zeros(m.shape, bool)
        for b in o.boxes: inside[round(b.ymin):round(b.ymax), round(b.xmin):round(b.xmax)] = True
        assert ((m > 0) == inside).all() and set(np.unique(m)) <= {0, *(b.label for b in o.boxes)}


# Your own boxes

def own(tmp_path, photos, n=12):
    data = scenes_data(photos)
    some = data.split('train')[:n]
    (tmp_path/'photos').mkdir(); (tmp_path/'xml').mkdir(); (tmp_path/'masks').mkdir()
    names = sorted({data.classes[t - 1] for i in some for t in data[i].tags})
    number = np.zeros(256, np.uint8); number[VOID] = VOID
    for k, name in enumerate(names, 1): number[data.classes.index(name) + 1] = k
    for i in some:
        shutil.copy(data[i].image, tmp_path/'photos'); shutil.copy(photos/f'Annotations/{i}.xml', tmp_path/'xml')
        write_mask(tmp_path/f'masks/{i}.png', number[data.read_truth(data[i])])
    return some, names


@pytest.mark.parametrize('kind', ['xml', 'coco'])
def test_a_model_from_your_own_boxes(kind, photos, tmp_path, capsys):
    some, names = own(tmp_path, photos)
    if kind == 'coco': voc_as_coco(scenes_data(photos), tmp_path/'c', {'train': some})
    given = tmp_path/'xml' if kind == 'xml' else tmp_path/'c/annotations/instances_train2017.json'
    argv = ['segment', str(tmp_path/'photos'), '--boxes', str(given), '-o', str(tmp_path/'model'), '--size', '64', '--epochs', '1', '--workers', '1']
    if kind == 'xml': argv += ['--masks', str(tmp_path/'masks'), '--test-fraction', '.3']
    assert main(argv) == 0
    about = json.loads((tmp_path/'model/model.json').read_text())
    assert about['net']['arch'] == 'deeplabv3plus-cosine' and (tmp_path/'model/pseudo_masks.jpg').stat().st_size > 1000
    if kind == 'xml': assert about['classes'][1:] == names and 0 <= json.loads((tmp_path/'model/score.json').read_text())['ignored']['miou'][0] <= 1
    assert main(['predict', str(tmp_path/'model'), str(tmp_path/'photos'), '-o', str(tmp_path/'out')]) == 0
    assert read_image(tmp_path/f'out/{some[0]}.png').shape == read_image(tmp_path/f'photos/{some[0]}.jpg').shape
    capsys.readouterr()
    assert main(argv) == 0 and 'running' not in capsys.readouterr().out


def test_bad_boxes_are_left_out_and_named(photos, tmp_path, capsys):
    "No area, an entity bomb, and a photo without a file: the others are used, and the command fails."
    some, _ = own(tmp_path, photos)
    empty, bomb, none = (tmp_path/f'xml/{i}.xml' for i in some[:3])
    text = empty.read_text()
    a, b = text.index('<xmin>'), text.index('</ymax>')
    empty.write_text(text[:a] + '<xmin>9</xmin><ymin>9</ymin><xmax>8</xmax><ymax>20' + text[b:])
    bomb.write_text('<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><annotation><object><name>&b;</name></object></annotation>')
    none.unlink()
    assert main(['segment', str(tmp_path/'photos'), '--boxes', str(tmp_path/'xml'), '-o', str(tmp_path/'model'), '--size', '64', '--epochs', '1', '--workers', '1']) == 1
    said = capsys.readouterr()
    assert f'{len(some) - 3} photos with' in said.out and '3 not used' in said.err
    for i in some[:3]: assert i in said.err
    assert (tmp_path/'model/model.json').is_file()
