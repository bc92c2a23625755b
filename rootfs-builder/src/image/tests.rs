//! Images from layouts and archives into a store: whole ones, and all kinds of broken ones.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::erofs;
use crate::layer::testing::{Header, archive};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// An OCI layout and a store beside it.
struct Bench {
    directory: TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(bench.layout().join("blobs/sha256")).unwrap();
        bench
    }

    fn layout(&self) -> PathBuf {
        self.directory.path().join("layout")
    }

    fn store(&self) -> Store {
        Store::open(&self.directory.path().join("images")).unwrap()
    }

    fn blob(&self, kind: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.layout().join(blob_name(&digest)), bytes).unwrap();
        json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
    }

    /// Writes an image of layers and lets `change` change manifest and configuration before.
    fn image(&self, layers: &[Vec<u8>], change: impl FnOnce(&mut Value, &mut Value)) {
        let packed: Vec<Value> = layers
            .iter()
            .map(|layer| self.blob(LAYER, &gzip(layer)))
            .collect();
        let diff_ids: Vec<Digest> = layers.iter().map(|layer| Digest::of(layer)).collect();
        let mut config = json!({
            "architecture": "amd64", "os": "linux", "created": "2024-02-03T04:05:06Z",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let mut manifest = json!({"schemaVersion": 2, "layers": packed});
        change(&mut manifest, &mut config);
        manifest["config"] = self.blob("config", config.to_string().as_bytes());
        let mut entry = self.blob("manifest", manifest.to_string().as_bytes());
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
        self.index(&json!({"schemaVersion": 2, "manifests": [entry]}));
    }

    fn index(&self, index: &Value) {
        fs::write(self.layout().join("index.json"), index.to_string()).unwrap();
    }

    fn add(&self) -> Result<Stored, StoreError> {
        let source = Source::directory(&self.layout());
        let image = source.oci_image(None)?;
        self.store()
            .add(&image, &source, Limits::default(), &mut |_| {})
    }

    /// The error of adding the image, with its causes, after a look at what is left of it.
    fn refusal(&self) -> String {
        let error = self.add().unwrap_err();
        let left: Vec<_> = fs::read_dir(self.directory.path().join("images"))
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name != "lock")
            .collect();
        assert!(left.is_empty(), "left: {left:?}");
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn two_layers() -> Vec<Vec<u8>> {
    vec![
        archive(&[
            Header::file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n"),
            Header::file("etc/old", b"old"),
        ]),
        archive(&[
            Header::file("etc/.wh.old", b""),
            Header::file("new", b"new"),
        ]),
    ]
}

#[test]
fn an_image_is_made_once_and_found_by_its_names() {
    let bench = Bench::new();
    bench.image(&two_layers(), |_, _| {});
    let stored = bench.add().unwrap();
    let store = bench.store();
    let name = Name {
        id: stored.id,
        digest: None,
    };
    store.name(&["example.org/a:1".to_owned()], &name).unwrap();

    let disk = stored.open_disk().unwrap();
    let image = erofs::Image::open(&disk).unwrap();
    assert_eq!(image.read_file("/new", 10).unwrap().unwrap(), b"new");
    assert_eq!(image.find("/etc/old").unwrap(), None);

    let inode = |stored: &Stored| {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(stored.disk_path()).unwrap().ino()
    };
    assert_eq!(inode(&bench.add().unwrap()), inode(&stored));
    let found = store.find("example.org/a:1").unwrap().unwrap();
    assert_eq!(found.id, stored.id);
    assert_eq!(
        store.find(&stored.id.hex()[..6]).unwrap().unwrap().id,
        stored.id
    );
    assert!(store.find("example.org/b:1").unwrap().is_none());
    let listed = &store.list().unwrap()[0];
    assert_eq!(listed.names, [("example.org/a:1".to_owned(), None)]);
    assert_eq!(listed.created.as_deref(), Some("2024-02-03T04:05:06Z"));
}

#[test]
fn layers_of_every_packing_are_applied() {
    for pack in [
        &(|bytes: &[u8]| bytes.to_owned()) as &dyn Fn(&[u8]) -> Vec<u8>,
        &|bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap(),
        &gzip,
    ] {
        let bench = Bench::new();
        let layers = two_layers();
        bench.image(&layers, |manifest, _| {
            let packed = layers.iter().map(|layer| bench.blob(LAYER, &pack(layer)));
            manifest["layers"] = packed.collect();
        });
        let disk = bench.add().unwrap().open_disk().unwrap();
        let image = erofs::Image::open(&disk).unwrap();
        assert_eq!(image.read_file("/new", 10).unwrap().unwrap(), b"new");
    }
}

#[test]
fn the_same_layers_give_the_same_bytes() {
    let disks = [Bench::new(), Bench::new()].map(|bench| {
        bench.image(&two_layers(), |_, _| {});
        bench.add().unwrap().record().unwrap().disk
    });
    assert_eq!(disks[0], disks[1]);
}

#[test]
fn an_image_for_several_machines_is_taken_for_ours() {
    let bench = Bench::new();
    bench.image(&two_layers(), |_, _| {});
    let index: Value =
        serde_json::from_slice(&fs::read(bench.layout().join("index.json")).unwrap()).unwrap();
    let mut ours = index["manifests"][0].clone();
    ours["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let mut other = bench.blob("manifest", b"{}");
    other["platform"] = json!({"os": "linux", "architecture": "s390x"});
    let inner = bench.blob(
        "index",
        json!({"manifests": [other, ours]}).to_string().as_bytes(),
    );
    bench.index(&json!({"manifests": [inner]}));
    bench.add().unwrap();

    bench.index(&json!({"manifests": [other, other]}));
    let said = bench.store().find("none").unwrap().is_none();
    assert!(said);
    let error = Source::directory(&bench.layout())
        .oci_image(None)
        .unwrap_err();
    assert!(error.to_string().contains("linux/s390x"), "{error}");
}

#[test]
fn a_tag_that_is_not_there_is_told_with_those_that_are() {
    let bench = Bench::new();
    bench.image(&two_layers(), |_, _| {});
    let source = Source::directory(&bench.layout());
    assert_eq!(source.oci_image(Some("latest")).unwrap().names, ["latest"]);
    let error = source.oci_image(Some("3.1")).unwrap_err().to_string();
    assert!(error.contains("3.1") && error.contains("latest"), "{error}");

    // Of several one has to be chosen, unless they are one image for several machines.
    let index = fs::read(bench.layout().join("index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let mut second = index["manifests"][0].clone();
    second["annotations"]["org.opencontainers.image.ref.name"] = json!("3.2\x1b[2J");
    bench.index(&json!({"manifests": [index["manifests"][0], second]}));
    let error = source.oci_image(None).unwrap_err().to_string();
    assert!(error.ends_with("latest, 3.2\\u{1b}[2J"), "{error}");
    bench.index(&json!({"manifests": []}));
    assert!(matches!(source.oci_image(None), Err(Error::NoImage)));
    let error = source.oci_image(Some("latest")).unwrap_err().to_string();
    assert!(error.ends_with("there are: none with a tag"), "{error}");
}

/// The members of a directory as an archive.
fn packed(directory: &Path, archive: &Path) {
    let status = std::process::Command::new("tar")
        .arg("-cf")
        .arg(archive)
        .arg("-C")
        .arg(directory)
        .arg(".")
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn archives_of_both_families_are_read_as_they_lie_there() {
    let bench = Bench::new();
    bench.image(&two_layers(), |_, _| {});
    let id = bench.add().unwrap().id;
    let file = bench.directory.path().join("image.tar");
    packed(&bench.layout(), &file);
    let source = Source::archive(&file).unwrap();
    assert_eq!(source.oci_image(Some("latest")).unwrap().id, id);

    let old = bench.directory.path().join("old");
    fs::create_dir_all(old.join("one")).unwrap();
    fs::create_dir_all(old.join("two")).unwrap();
    let layers = two_layers();
    fs::write(old.join("one/layer.tar"), &layers[0]).unwrap();
    // As older ones have a layer that is there twice.
    std::os::unix::fs::symlink("../one/layer.tar", old.join("two/layer.tar")).unwrap();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "rootfs": {"diff_ids": [Digest::of(&layers[0]), Digest::of(&layers[0])]},
    });
    fs::write(old.join("c.json"), config.to_string()).unwrap();
    let manifest = json!([{
        "Config": "c.json", "RepoTags": ["example.org/old:1"],
        "Layers": ["one/layer.tar", "two/layer.tar"],
    }]);
    fs::write(old.join("manifest.json"), manifest.to_string()).unwrap();
    packed(&old, &file);
    let source = Source::archive(&file).unwrap();
    let error = source.oci_image(None).unwrap_err().to_string();
    let place = format!("index.json in {}", file.display());
    assert!(error.contains(&place), "{error}");
    let image = source.docker_image(None).unwrap();
    assert_eq!(image.names, ["example.org/old:1"]);
    let error = source.docker_image(Some("old")).unwrap_err().to_string();
    assert!(
        error.contains("\"old\"; there are: example.org/old:1"),
        "{error}"
    );
    let store = bench.store();
    store
        .add(&image, &source, Limits::default(), &mut |_| {})
        .unwrap();

    fs::write(&file, gzip(b"packed")).unwrap();
    let error = Source::archive(&file).unwrap_err().to_string();
    assert!(error.contains("unpack a compressed one"), "{error}");
}

#[test]
fn a_layer_that_is_not_what_was_declared_is_refused() {
    for (damage, why) in [
        (
            &(|bytes: &mut Vec<u8>| bytes.truncate(60)) as &dyn Fn(&mut Vec<u8>),
            "60 bytes",
        ),
        (&|bytes: &mut Vec<u8>| bytes.push(0), "truncated or another"),
        (&|bytes: &mut Vec<u8>| bytes[40] ^= 1, "has the digest"),
        (&|bytes: &mut Vec<u8>| bytes.clear(), "0 bytes"),
    ] {
        let bench = Bench::new();
        bench.image(&two_layers(), |_, _| {});
        let digest = Digest::of(&gzip(&two_layers()[1]));
        let path = bench.layout().join(blob_name(&digest));
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, bytes).unwrap();
        let said = bench.refusal();
        assert!(said.contains("layer 2") && said.contains(why), "{said}");
        assert!(said.contains(&digest.hex()), "{said}");
    }
}

#[test]
fn an_unpacked_layer_that_is_not_what_the_configuration_says_is_refused() {
    let bench = Bench::new();
    bench.image(&two_layers(), |_, config| {
        config["rootfs"]["diff_ids"][0] = json!(Digest::of(b"another"));
    });
    let said = bench.refusal();
    assert!(
        said.contains("layer 1") && said.contains("unpacked"),
        "{said}"
    );
}

#[test]
fn documents_that_do_not_fit_are_refused() {
    for (change, why) in [
        (
            &(|_: &mut Value, config: &mut Value| config["architecture"] = json!("arm64"))
                as &dyn Fn(&mut Value, &mut Value),
            "linux/arm64",
        ),
        (
            &|_, config| config["rootfs"]["diff_ids"] = json!([]),
            "2 layers, but digests of 0",
        ),
        (
            &|manifest, _| manifest["layers"][1]["mediaType"] = json!("application/x-thing"),
            "layer 2",
        ),
        (
            &|manifest, _| manifest["layers"][0]["digest"] = json!("sha512:00"),
            "sha512:00",
        ),
        (
            &|manifest, _| manifest["layers"][0]["size"] = json!(-1),
            "not valid",
        ),
        (
            &|manifest, _| manifest["mediaType"] = json!("application/x"),
            "application/x",
        ),
        (&|_, config| *config = json!("text"), "the configuration"),
    ] {
        let bench = Bench::new();
        bench.image(&two_layers(), |manifest, config| change(manifest, config));
        let said = bench.refusal();
        assert!(said.contains(why), "{said}");
    }
    let bench = Bench::new();
    bench.image(&two_layers(), |_, _| {});
    fs::remove_file(bench.layout().join("index.json")).unwrap();
    assert!(bench.refusal().contains("index.json"));
}

#[test]
fn a_hostile_layer_is_refused_by_layer_and_entry() {
    let hostile = archive(&[Header::file("../../etc/evil", b"evil")]);
    let bench = Bench::new();
    bench.image(&[two_layers()[0].clone(), hostile], |_, _| {});
    let said = bench.refusal();
    assert!(
        said.contains("layer 2") && said.contains("../../etc/evil"),
        "{said}"
    );
}

#[test]
fn a_bomb_is_refused_by_its_layer() {
    let bench = Bench::new();
    let bomb = archive(&[Header::file("zeros", &vec![0; 3 << 20])]);
    bench.image(&[bomb], |_, _| {});
    let source = Source::directory(&bench.layout());
    let image = source.oci_image(None).unwrap();
    let limits = Limits {
        unpacked_bytes: 2 << 20,
        ..Limits::default()
    };
    let error = bench.store().add(&image, &source, limits, &mut |_| {});
    let error = error.unwrap_err();
    assert!(error.to_string().contains("layer 1"), "{error}");
    assert!(bench.store().get(image.id).is_none());
}

#[test]
fn a_disk_that_was_written_to_is_not_opened_any_more() {
    let bench = Bench::new();
    bench.image(&two_layers(), |_, _| {});
    let stored = bench.add().unwrap();
    let path = stored.disk_path();
    let bytes = fs::read(&path).unwrap();
    // Another inode of the same content is recognized, and only once read through.
    fs::remove_file(&path).unwrap();
    fs::write(&path, &bytes).unwrap();
    stored.open_disk().unwrap();
    let record = stored.record().unwrap();
    stored.open_disk().unwrap();
    assert_eq!(stored.record().unwrap(), record);
    let mut changed = bytes;
    changed[5000] ^= 1;
    fs::write(&path, &changed).unwrap();
    let error = stored.open_disk().unwrap_err().to_string();
    assert!(
        error.contains("changed") && error.contains("rmi"),
        "{error}"
    );
    let config = path.with_file_name("config.json");
    fs::write(&config, "{}").unwrap();
    assert!(stored.config().unwrap_err().to_string().contains("changed"));
}

#[test]
fn names_and_images_are_removed_as_asked() {
    let bench = Bench::new();
    bench.image(&two_layers(), |_, _| {});
    let stored = bench.add().unwrap();
    let store = bench.store();
    let name = Name {
        id: stored.id,
        digest: None,
    };
    store
        .name(&["a:1".to_owned(), "a:2".to_owned()], &name)
        .unwrap();

    let error = store.remove(&stored.id.hex(), false).unwrap_err();
    assert!(error.to_string().contains("a:1, a:2"), "{error}");
    assert!(store.remove("a:1", false).unwrap().images.is_empty());
    assert!(store.get(stored.id).is_some());
    assert_eq!(store.remove("a:2", false).unwrap().images, [stored.id]);
    assert!(store.get(stored.id).is_none());
    let error = store.remove("a:2", false).unwrap_err().to_string();
    assert!(
        error.contains("a:2") && error.contains("bulkhead images"),
        "{error}"
    );

    bench.add().unwrap();
    fs::write(store.downloads().unwrap().join("x.part"), vec![1; 9000]).unwrap();
    let freed = store.prune(false).unwrap();
    assert_eq!(freed.images, [stored.id]);
    assert!(freed.bytes > 9000);
    assert!(store.list().unwrap().is_empty());
}

#[test]
fn what_a_killed_maker_left_is_cleared_away() {
    let bench = Bench::new();
    bench.image(&two_layers(), |_, _| {});
    let left = bench.directory.path().join("images/making/image");
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("disk.erofs"), "half").unwrap();
    let stored = bench.add().unwrap();
    erofs::Image::open(&stored.open_disk().unwrap()).unwrap();
    assert!(!left.exists());
}
