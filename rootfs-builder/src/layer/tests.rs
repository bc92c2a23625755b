//! Layers on layers, friendly and hostile ones.

use proptest::prelude::*;
use tempfile::TempDir;

use super::testing::{Header, archive};
use super::*;

/// An image under construction.
struct Bench {
    filesystem: FileSystem,
    spool: Spool,
    budget: Budget,
    layers: u32,
    _directory: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::with_limits(Limits::default())
    }

    fn with_limits(limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            filesystem: FileSystem::new(),
            spool: Spool::new(directory.path()).unwrap(),
            budget: Budget::new(limits),
            layers: 0,
            _directory: directory,
        }
    }

    fn try_layer(&mut self, members: &[Header]) -> Result<(), Error> {
        self.layers += 1;
        apply(
            &mut self.filesystem,
            &mut self.spool,
            &mut self.budget,
            &archive(members)[..],
            self.layers,
        )
    }

    fn layer(mut self, members: &[Header]) -> Self {
        self.try_layer(members).unwrap();
        self
    }

    /// The error of a layer, with its causes.
    fn refuses(mut self, members: &[Header]) -> String {
        let error = self.try_layer(members).unwrap_err();
        let cause = std::error::Error::source(&error);
        format!(
            "{error}: {}",
            cause.map(ToString::to_string).unwrap_or_default()
        )
    }

    /// All paths, each with what is there: a file's content, a link's target.
    fn tree(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut open = vec![(FileSystem::ROOT, String::new())];
        while let Some((directory, path)) = open.pop() {
            for (name, entry) in self.filesystem.names(directory).unwrap() {
                let path = format!("{path}{}", String::from_utf8_lossy(name));
                match &self.filesystem.inode(entry.inode).kind {
                    Kind::Directory(_) => {
                        lines.push(format!("{path}/"));
                        open.push((entry.inode, path + "/"));
                    }
                    Kind::File(extent) => {
                        let mut content = String::new();
                        let mut reader = self.spool.read(*extent);
                        reader.read_to_string(&mut content).unwrap();
                        lines.push(format!("{path}={content}"));
                    }
                    Kind::Symlink(target) => {
                        lines.push(format!("{path}>{}", String::from_utf8_lossy(target)));
                    }
                    other => lines.push(format!("{path} {other:?}")),
                }
            }
        }
        lines.sort();
        lines
    }
}

fn file(path: &str) -> Header {
    Header::file(path, path.as_bytes())
}

#[test]
fn what_a_layer_adds_is_there() {
    let bench = Bench::new().layer(&[
        Header::directory("./"),
        Header::directory("./etc/").mode(0o700),
        file("./etc/motd"),
        Header::symlink("bin", "usr/bin"),
        file("/usr/bin/tool"),
    ]);
    assert_eq!(
        bench.tree(),
        [
            "bin>usr/bin",
            "etc/",
            "etc/motd=./etc/motd",
            "usr/",
            "usr/bin/",
            "usr/bin/tool=/usr/bin/tool"
        ]
    );
}

#[test]
fn a_whiteout_hides_what_lower_layers_have_and_no_more() {
    let lower = [
        file("a/one"),
        file("a/two"),
        file("b/deep/three"),
        file("c"),
    ];
    let bench = Bench::new().layer(&lower).layer(&[
        file("a/.wh.one"),
        file("a/.wh.nothing"),
        file("nowhere/.wh.thing"),
        // A whiteout is for lower layers, wherever it lies among the members.
        Header::file("c", b"new"),
        file(".wh.c"),
        file("b/new"),
        file(".wh.b"),
    ]);
    assert_eq!(
        bench.tree(),
        ["a/", "a/two=a/two", "b/", "b/new=b/new", "c=new"]
    );
}

#[test]
fn an_opaque_directory_shows_its_own_layer_alone() {
    let lower = [file("a/b/old"), file("a/c/old"), file("a/old")];
    let upper = [
        Header::directory("a/"),
        file("a/b/new"),
        file("a/.wh..wh..opq"),
        file("a/new"),
    ];
    let bench = Bench::new().layer(&lower).layer(&upper);
    assert_eq!(
        bench.tree(),
        ["a/", "a/b/", "a/b/new=a/b/new", "a/new=a/new"]
    );
}

#[test]
fn kinds_replace_each_other() {
    let bench = Bench::new()
        .layer(&[file("x/in"), file("y"), Header::symlink("z", "x")])
        .layer(&[file("x"), Header::directory("y"), file("y/in")])
        .layer(&[Header::directory("z")]);
    assert_eq!(bench.tree(), ["x=x", "y/", "y/in=y/in", "z/"]);
}

#[test]
fn a_directory_that_comes_again_keeps_what_is_in_it() {
    let bench = Bench::new()
        .layer(&[Header::directory("a").mode(0o700), file("a/in")])
        .layer(&[Header::directory("a").mode(0o1777)]);
    assert_eq!(bench.tree(), ["a/", "a/in=a/in"]);
    let entry = bench.filesystem.lookup(FileSystem::ROOT, b"a").unwrap();
    assert_eq!(bench.filesystem.inode(entry.inode).attributes.mode, 0o1777);
}

#[test]
fn a_hard_link_is_another_name_for_the_same_inode() {
    let bench = Bench::new()
        .layer(&[file("a/one"), Header::hard_link("two", "/a/one")])
        .layer(&[Header::hard_link("three", "./two"), file("a/.wh.one")]);
    assert_eq!(bench.tree(), ["a/", "three=a/one", "two=a/one"]);
    let inode = |name: &[u8]| bench.filesystem.lookup(FileSystem::ROOT, name);
    assert_eq!(inode(b"two").unwrap().inode, inode(b"three").unwrap().inode);
}

#[test]
fn links_within_the_image_are_followed() {
    let bench = Bench::new()
        .layer(&[
            file("usr/lib/old"),
            Header::symlink("lib", "usr/lib"),
            Header::symlink("usr/up", "../usr/./lib"),
        ])
        .layer(&[file("lib/new"), file("usr/up/newer"), file("lib/.wh.old")]);
    assert_eq!(
        bench.tree(),
        [
            "lib>usr/lib",
            "usr/",
            "usr/lib/",
            "usr/lib/new=lib/new",
            "usr/lib/newer=usr/up/newer",
            "usr/up>../usr/./lib"
        ]
    );
}

#[test]
fn attributes_of_other_systems_and_of_overlays_are_left_out() {
    let bench = Bench::new().layer(&[file("a")
        .pax("SCHILY.xattr.security.capability", b"\x01")
        .pax("SCHILY.xattr.com.apple.provenance", b"x")
        .pax("SCHILY.xattr.trusted.overlay.redirect", b"/etc")
        .pax("SCHILY.xattr.user.note", b"y")]);
    let entry = bench.filesystem.lookup(FileSystem::ROOT, b"a").unwrap();
    let names = &bench.filesystem.inode(entry.inode).attributes.xattrs;
    assert_eq!(
        names.keys().collect::<Vec<_>>(),
        [&b"security.capability"[..], b"user.note"]
    );
}

#[test]
fn paths_that_lead_out_are_refused_by_their_names() {
    for path in ["../evil", "a/../../evil", "/..", "a/.."] {
        let said = Bench::new().refuses(&[file(path)]);
        assert!(said.contains(path) && said.contains("leads out"), "{said}");
    }
    for target in ["/", "/etc", "../..", "a/../../.."] {
        let layer = [Header::symlink("dir/link", target), file("dir/link/evil")];
        let said = Bench::new().refuses(&layer);
        assert!(said.contains("dir/link/evil"), "{said}");
        assert!(
            said.contains(target) && said.contains("out of the image"),
            "{said}"
        );
        // The link alone is harmless: it means something in the container only.
        Bench::new().layer(&layer[..1]);
    }
    // Less deep than it looks.
    let said = Bench::new().refuses(&[
        Header::symlink("here", "."),
        Header::symlink("up", "here/.."),
        file("up/evil"),
    ]);
    assert!(
        said.contains("up/evil") && said.contains("leads out"),
        "{said}"
    );
    let said = Bench::new().refuses(&[file("a"), Header::hard_link("b", "../../etc/passwd")]);
    assert!(said.contains("leads out"), "{said}");
}

#[test]
fn links_that_lead_to_each_other_end() {
    let said = Bench::new().refuses(&[
        Header::symlink("a", "b"),
        Header::symlink("b", "a"),
        file("a/x"),
    ]);
    assert!(said.contains("more than 40 symbolic links"), "{said}");
}

#[test]
fn members_that_cannot_be_are_refused_by_their_names() {
    for (layer, why) in [
        (vec![file("twice"), file("twice")], "is there twice"),
        (
            vec![file("./twice"), Header::directory("twice")],
            "is there twice",
        ),
        (vec![file("f"), file("f/in")], "not a directory"),
        (vec![Header::symlink("./", "x")], "root"),
        (vec![file(".wh.")], "whiteout"),
        (vec![file(".wh..")], "whiteout"),
        (vec![file("a/.wh.b/c")], "whiteout"),
        (vec![Header::hard_link("l", "nothing")], "\"nothing\""),
        (
            vec![Header::directory("d"), Header::hard_link("l", "d")],
            "hard link",
        ),
        (vec![Header::symlink("l", "")], "0 bytes"),
        (vec![Header::device("dev/gone", (0, 0))], "device 0:0"),
        (vec![Header::device("dev/far", (4096, 1))], "device 4096:1"),
        (vec![file("f").pax("uid", b"4294967295")], "4294967295"),
        (vec![file("f").pax("path", &[b'n'; 256])], "too long"),
        (
            vec![file("f").pax("SCHILY.xattr.user.x", &[0; 70_000])],
            "70000 bytes",
        ),
    ] {
        let name = String::from_utf8_lossy(&layer.last().unwrap().path).into_owned();
        let said = Bench::new().refuses(&layer);
        assert!(said.contains(why), "{said}");
        assert!(said.contains(&name) || name == "f", "{said}");
    }
}

#[test]
fn every_limit_is_kept() {
    let limited = |limits| Bench::with_limits(limits);
    let all = Limits::default();
    let few = Limits { entries: 3, ..all };
    let said = limited(few).refuses(&[file("a"), file("b/c/d/e")]);
    assert!(said.contains("more than 3 entries"), "{said}");
    let small = Limits {
        metadata_bytes: 1000,
        ..all
    };
    let said = limited(small).refuses(&[file("a").pax("SCHILY.xattr.user.x", &[0; 1000])]);
    assert!(said.contains("1000 bytes of names"), "{said}");
    let short = Limits { steps: 50, ..all };
    let opaque: Vec<Header> = (0..30).map(|_| file("a/b/.wh..wh..opq")).collect();
    let said = limited(short).layer(&[file("a/b/c")]).refuses(&opaque);
    assert!(said.contains("50 steps"), "{said}");
}

#[test]
fn a_size_beyond_all_bounds_is_refused_before_anything_is_unpacked() {
    let huge = file("huge").pax("size", b"9223372036854775807");
    let said = Bench::new().refuses(&[huge]);
    assert!(
        said.contains("huge") && said.contains("bytes unpacked"),
        "{said}"
    );
    let said = Bench::new().refuses(&[file("long").pax("size", b"100000")]);
    assert!(
        said.contains("long") && said.contains("cannot be unpacked"),
        "{said}"
    );
}

/// Paths of few names, so that members meet.
fn path() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["a", "b", "..", ".", ".wh.a", ".wh..wh..opq", "l"]);
    prop::collection::vec(name, 1..4).prop_map(|parts| parts.join("/"))
}

fn member() -> impl Strategy<Value = Header> {
    let kind = prop::sample::select(b"0125346".to_vec());
    (kind, path(), path()).prop_map(|(kind, path, target)| Header {
        target: target.into(),
        ..Header::raw(kind, &path, b"")
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_layers_are_applied_or_refused_and_the_result_can_be_written(
        layers in prop::collection::vec(prop::collection::vec(member(), 0..12), 1..4),
    ) {
        let mut bench = Bench::new();
        for layer in &layers {
            let _ = bench.try_layer(layer);
        }
        let mut image = tempfile::tempfile().unwrap();
        let written = crate::erofs::write(&bench.filesystem, &bench.spool, [0; 16], &mut image);
        prop_assert!(written.is_ok(), "{:?}", written);
        let image = crate::erofs::Image::open(&image).unwrap();
        prop_assert!(image.root().unwrap().is_directory());
    }
}
