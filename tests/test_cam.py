"""CAM against the original's arrays, and its properties on real layouts."""
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastai.callback.core import Callback

from wsss_nb.data.items import InputError
from wsss_nb.data.pets import pets
from wsss_nb.data.sample import sample
from wsss_nb.data.store import MapStore
from wsss_nb.data.voc import voc
from wsss_nb.localize import backbones
from wsss_nb.localize.cam import (CamClassifier, cam, cam_learner, load_classifier, pooled_features, save_classifier, train_from_head, train_head,
                                  write_cams)

GOLDEN = Path(__file__).parent/'golden'


class Given(nn.Module):
    "A backbone that returns given features."
    def __init__(self, features):
        super().__init__()
        self.features, self.num_features = features, features.shape[1]
    def forward_features(self, x): return self.features


@pytest.fixture(scope='module')
def golden():
    with np.load(GOLDEN/'pets_cam.npz', allow_pickle=False) as z: return {k: z[k] for k in z}


@pytest.mark.parametrize('i', [0, 1])
def test_cam_of_the_pets_system(golden, i):
    "Single scale, no flip, then bilinear to 224: the map the original thresholds."
    feat = torch.tensor(golden[f'feat{i}']).reshape(1, -1, *golden[f'feat{i}'].shape[-2:])
    net = CamClassifier(Given(feat), 4)
    with torch.no_grad(): net.head.weight.copy_(torch.tensor(golden['fc_weight'])), net.head.bias.copy_(torch.tensor(golden['fc_bias']))
    m, z = cam(net, torch.zeros(1, 3, 224, 224), scales=(1.,), flip=False)
    assert np.allclose(z.numpy().ravel(), golden[f'logits{i}'].ravel(), atol=1e-4)
    assert z.argmax() == golden[f'cls{i}']
    full = F.interpolate(m, size=(224, 224), mode='bilinear', align_corners=False)[0, int(golden[f'cls{i}'])]
    assert np.allclose(full.numpy(), golden[f'cam{i}'], atol=1e-3)


def test_raw_map_of_zhou(golden):
    net = CamClassifier(Given(torch.tensor(golden['zhou_feat'])), 3)
    with torch.no_grad(): net.head.weight.copy_(torch.tensor(golden['zhou_weight']))
    with torch.inference_mode(): m, _ = net.maps(torch.zeros(1, 3, 7, 7))
    assert np.allclose(m[0, golden['zhou_class_idx']].numpy(), golden['zhou_raw_cam_7x7'], atol=1e-5)


@pytest.mark.parametrize('stride', [8, 16, 32])
def test_mean_of_the_map_is_the_logit(stride):
    torch.manual_seed(stride)
    net = CamClassifier(backbones.create_backbone(output_stride=stride, pretrained=False), 3).eval()
    nn.init.normal_(net.head.bias)
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        m, z = net.maps(x)
        assert torch.allclose(m.mean((2, 3)) + net.head.bias, net(x), atol=1e-4) and torch.allclose(z, net(x), atol=1e-4)
        a, b = cam(net, x, scales=(1., .5))[0], cam(net, x.flip(3), scales=(1., .5))[0]
    assert torch.allclose(a.flip(3), b, atol=1e-3)


def test_multi_label_on_voc(tmp_path):
    "Several tags an image: one map each; the head learns (trap T1)."
    view = voc(sample(profile='smoke')/'voc/VOC2012').view('tags', 'train')
    learn = cam_learner(view, size=64, bs=4, pretrained=False)
    before = learn.model.head.weight.detach().clone()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert not torch.equal(before, learn.model.head.weight)
    store = MapStore(tmp_path)
    assert write_cams(learn.model, view, store, size=64, scales=(1.,)) == []
    for o in view:
        m = store.load(o.id)
        assert tuple(m.keys) == o.tags and 0 <= m.values.min() and m.values.max() <= 1
    assert max(len(o.tags) for o in view) > 1


def test_broken_photos_are_listed_and_the_rest_is_done(tmp_path):
    import shutil
    shutil.copytree(sample(profile='smoke')/'pets', tmp_path/'pets')
    view = pets(tmp_path/'pets').view('tags', 'trainval')
    view[1].image.write_bytes(b'\xff\xd8 no')
    net, store = CamClassifier(backbones.create_backbone(pretrained=False), len(view.classes)), MapStore(tmp_path/'maps')
    bad = write_cams(net, view, store, size=64, scales=(1.,), bs=4)
    assert [i for i, _ in bad] == [view[1].id] and view[1].image.name in bad[0][1] and len(store) == len(view) - 1


def test_absent_weights_name_the_package(monkeypatch):
    monkeypatch.setitem(backbones.PACKAGED, 'tf_efficientnet_lite0', 'no_such_package')
    with pytest.raises(InputError, match='pip install no-such-package'): backbones.create_backbone('tf_efficientnet_lite0')


def test_edited_classifier_is_refused(tmp_path):
    view = pets(sample(profile='smoke')/'pets').view('tags', 'trainval')
    learn = cam_learner(view, size=64, bs=4, pretrained=False)
    config = dict(backbone='tf_efficientnet_lite0', output_stride=16, n_outputs=len(view.classes))
    save_classifier(learn, tmp_path, config)
    assert torch.equal(load_classifier(tmp_path).head.weight, learn.model.head.weight.cpu())
    save_classifier(learn, tmp_path, config | {'n_outputs': 3})
    with pytest.raises(InputError, match='not a readable classifier'): load_classifier(tmp_path)


def test_features_are_those_of_the_classifier():
    "The head on the stored features gives the logits of the whole network, for the photo and for its mirror image."
    view = pets(sample(profile='smoke')/'pets', classes=37).view('tags', 'test')
    learn = cam_learner(view, size=96); net = learn.model.eval()
    x = torch.cat([learn.dls.test_dl(list(view), bs=64).one_batch()[0]])
    f = pooled_features(net.backbone, view, 96, bs=4)
    with torch.inference_mode():
        assert torch.allclose(net.head(f[:, 0]), net(x), atol=1e-4)
        assert torch.allclose(net.head(f[:, 1]), net(x.flip(3)), atol=1e-4)


@pytest.mark.parametrize('layout', ['pets', 'voc'])
def test_only_the_head_learns(layout):
    "Single-label and multi-label: the backbone is the untouched one, the head is not, and twice the same."
    view = (pets(sample(profile='smoke')/'pets', classes=37) if layout == 'pets' else voc(sample(profile='smoke')/'voc/VOC2012')).view('tags', 'trainval' if layout == 'pets' else 'train')
    learn = train_head(view, epochs=4, size=96)
    ours, pure = learn.model.backbone.state_dict(), backbones.create_backbone(output_stride=16).state_dict()
    assert all(torch.equal(ours[k], pure[k]) for k in pure)
    assert learn.model.head.weight.abs().sum() > cam_learner(view, size=96).model.head.weight.abs().sum()
    again = train_head(view, epochs=4, size=96)
    assert torch.equal(again.model.head.weight, learn.model.head.weight)


def test_the_head_first_then_all(tmp_path):
    "Without epochs it is `train_head`; the rest starts there; stopped after the first of two epochs it ends with the same weights, without fitting the head again."
    view = pets(sample(profile='smoke')/'pets', classes=37).view('tags', 'test').keep(lambda o, seen=[]: len(seen) < 12 and not seen.append(o))
    shape = dict(size=64, bs=4, output_stride=32, head_epochs=3)
    head = train_head(view, 3, size=64, bs=4, output_stride=32).model.state_dict()
    start = train_from_head(view, 0, **shape).model.state_dict()
    assert all(torch.equal(head[k], start[k]) for k in head)
    whole = train_from_head(view, 2, **shape).model.state_dict()
    assert not torch.equal(whole['backbone.conv_stem.weight'], start['backbone.conv_stem.weight'])
    assert all(torch.equal(whole[k], start[k]) for k in whole if '.bn' in k)     # batch normalisation is ImageNet's
    class Stop(Callback):
        order = 95
        def after_epoch(self): raise KeyboardInterrupt
    def stopping(*args, **kwargs):
        learn = cam_learner(*args, **kwargs); learn.add_cb(Stop())
        return learn
    with pytest.raises(KeyboardInterrupt): train_from_head(view, 2, path=tmp_path/'c.pth', learner=stopping, **shape)
    again = train_from_head(view, 2, path=tmp_path/'c.pth', head_lr=1e9, **shape).model.state_dict()
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_features_name_a_broken_photo(tmp_path):
    from dataclasses import replace
    broken = tmp_path/'broken.jpg'; broken.write_bytes(b'no photo')
    items = [replace(o, image=broken) for o in pets(sample(profile='smoke')/'pets', classes=37).view('tags', 'test')][:1]
    with pytest.raises(InputError, match='broken.jpg'): pooled_features(cam_learner(pets(sample(profile='smoke')/'pets').view('tags', 'test'), size=96).model.backbone, items, 96)
