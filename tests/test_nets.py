"Every architecture under one tester; the pets system's U-Net against its own logits."
from pathlib import Path
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from wsss_nb.data.items import InputError
from wsss_nb.localize.backbones import PACKAGED, package_weights
from wsss_nb.segment.nets import ARCHITECTURES, OriginalUNet, SegmentNet, create_net

GOLDEN = Path(__file__).parent/'golden'
OPTIONS = {
    'unet': {}, 'unet, stride 1': dict(arch='unet', decoder_channels=(16, 16, 8, 8, 8)), 'unet, stride 8': dict(arch='unet', decoder_channels=(16, 8)),
    'unetplusplus': dict(decoder_channels=(32, 16, 16, 8, 8)), 'manet': dict(decoder_channels=(32, 16, 16, 8, 8)), 'linknet': {}, 'fpn': {},
    'pspnet': {}, 'deeplabv3': dict(decoder_channels=32), 'deeplabv3plus': dict(decoder_channels=32), 'pan': {}, 'segformer': {}, 'upernet': dict(decoder_channels=32),
    'original_unet': dict(filters=(4, 8, 16, 32)), 'deeplab_largefov': {}, 'deeplab_v2': {}, 'spml': dict(dim=8), 'deeplab_v2, wide': dict(arch='deeplab_v2', hidden=32, output_stride=16),
    'unet-cosine': {}, 'deeplab_largefov-cosine': {}, 'deeplab_v2-cosine': dict(hidden=32), 'deeplabv3plus-cosine': dict(decoder_channels=32),
    'deeplabv3plus, groups': dict(arch='deeplabv3plus', decoder_channels=32, group_norm=True),
}


@pytest.fixture(params=OPTIONS, scope='module')
def net(request):
    o = {'arch': request.param, **OPTIONS[request.param]}
    torch.manual_seed(0)
    return create_net(**o, n_classes=3, pretrained=False)


@pytest.mark.parametrize('size', [(64, 64), (65, 47), (31, 100)])
def test_shape(net, size):
    with torch.no_grad(): y = net.eval()(torch.rand(1, 3, *size))
    assert y.shape == (1, 3, *size) and y.isfinite().all()


def test_backward(net):
    "A training step reaches every trainable parameter that the logits depend on, and changes the logits."
    x, y = torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    opt = torch.optim.SGD(net.parameters(), .1)
    before = torch.nn.functional.cross_entropy(net.train()(x), y)
    before.backward()
    with_grad = [n for n, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    if net.config['arch'] not in ('pspnet', 'spml'):   # the encoder of the one ends at stride 8, that of the other stands still up to stride 4
        assert len(with_grad) > .8 * len(list(net.parameters())), 'most parameters receive gradient'
    if hasattr(net.net, 'encoder') and net.config['arch'] not in ('deeplab_largefov', 'deeplab_largefov-cosine', 'spml'): assert 'net.encoder.model.conv_stem.weight' in with_grad, 'the gradient reaches the first convolution'
    opt.step(); opt.zero_grad()
    assert torch.nn.functional.cross_entropy(net(x), y) != before


def test_save_load(net, tmp_path):
    "safetensors and the config make the same network again."
    x = torch.rand(1, 3, 40, 56)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path/'net.safetensors')
    again = create_net(**net.config, pretrained=False)
    again.load_state_dict(load_file(tmp_path/'net.safetensors'))
    with torch.no_grad(): assert again.eval()(x).equal(net.eval()(x))


def test_memory_format(net):
    "channels_last is the same function."
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        a = net.eval()(x)
        b = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        net.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_every_architecture_is_tried():
    tried = {o.get('arch', k) for k, o in OPTIONS.items() if '-cosine' not in k}
    assert set(ARCHITECTURES) - tried == {'dpt'}, 'dpt needs a vision transformer'


def test_export():
    "The default network can be exported as a graph."
    net, x = create_net(pretrained=False).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


def test_original_unet_golden():
    "Logits of the original code on its own weights."
    with np.load(GOLDEN/'pets_seed1_unet.npz', allow_pickle=False) as z:
        x, want = torch.from_numpy(z['x']), torch.from_numpy(z['logits'])
        weights = {k[2:]: torch.from_numpy(z[k]) for k in z if k.startswith('w.')}
        n, filters = int(z['n_params_default']), tuple(z['filters'].tolist())
    net = create_net('original_unet', filters=filters).eval()
    net.net.load_state_dict(weights, strict=True)
    with torch.no_grad(): torch.testing.assert_close(net(x), want, atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in OriginalUNet().parameters()) == n


@pytest.mark.parametrize('name', PACKAGED)
def test_package_weights(name):
    net, weights = create_net(backbone=name), package_weights(name)
    own = net.net.encoder.model.state_dict()
    assert all(v.equal(weights[k]) for k, v in own.items())
    assert len(own) > len(weights) - 9, 'all but the head (convolution, norm, classifier) is used'


def test_missing_package(monkeypatch):
    monkeypatch.setitem(PACKAGED, 'tf_efficientnet_lite0', 'no_such_package')
    with pytest.raises(InputError, match='pip install no-such-package'): create_net()


def test_padding_goes_right_and_below():
    "Pixels stay where they were: the answer of an odd image is the padded image's, cropped."
    torch.manual_seed(0)
    net, x = create_net(pretrained=False).eval(), torch.rand(1, 3, 50, 70)
    padded = torch.nn.functional.pad(x, (0, 96 - 70, 0, 64 - 50), mode='replicate')
    with torch.no_grad(): assert net(x).equal(net(padded)[..., :50, :70])
    assert isinstance(net, SegmentNet)
