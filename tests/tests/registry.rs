//! Images from a registry: whole or not at all, for these machines, with credentials and certificates.

use std::fs;

use anyhow::{Context, Result, ensure};
use rootfs_builder::digest::Digest;
use serde_json::{Value, json};
use system_tests::{
    client::terminal::Terminal,
    image::{Host, Layout, Packing},
    registry::{CREDENTIALS, DOCKER_LIST, OCI_INDEX, Registry, Speech, certify},
    scratch,
};

/// The arguments of a fetch with the right credentials.
fn with<'a>(name: &'a str, flags: &[&'a str]) -> Vec<&'a str> {
    [&["--creds", CREDENTIALS], flags, &[name]].concat()
}

#[test]
fn a_registry_with_a_certificate_is_asked_if_its_authority_is_known() -> Result<()> {
    let mut layout = Layout::new()?;
    layout.layer(Packing::Gzip, |root| Ok(fs::write(root.join("x"), "x")?))?;
    layout.save(&json!({"Cmd": ["/x"]}))?;
    let registry = Registry::start(Speech::Encrypted)?;
    let name = registry.push(&layout, "app:1")?;
    let host = Host::new()?;
    let directory = registry.path().display().to_string();
    let said = host.refusal("pull", &with(&name, &["--tls-verify=true"]))?;
    assert!(said.contains("certificate"), "{said}");
    assert!(host.kept()?.is_empty());
    let id = host.bulkhead(
        "pull",
        &with(&name, &["--tls-verify=true", "--cert-dir", &directory]),
    )?;
    assert_eq!(
        host.bulkhead("pull", &with(&name, &["--tls-verify=false"]))?,
        id
    );
    // An authority that signed something else.
    let other = scratch::directory()?;
    certify(other.path())?;
    let other = other.path().display().to_string();
    let said = host.refusal(
        "pull",
        &with(&name, &["--tls-verify=true", "--cert-dir", &other]),
    )?;
    assert!(said.contains("certificate"), "{said}");
    Ok(())
}

#[test]
fn an_image_comes_from_a_registry_whole_or_not_at_all() -> Result<()> {
    let mut layout = Layout::new()?;
    layout.layer(Packing::Gzip, |root| {
        fs::copy(scratch::noise(600_000)?.path(), root.join("noise"))?;
        Ok(())
    })?;
    let digest = layout.save(&json!({"Cmd": ["/noise"]}))?;
    let layer_path = layout.last_layer()?;
    let layer_bytes = fs::read(&layer_path)?;
    let layer = Digest::of(&layer_bytes);
    let registry = Registry::start(Speech::Plain)?;
    let name = registry.push(&layout, "team/app:1")?;
    let host = Host::new()?;
    let with =
        |name: &str| -> Result<String> { host.bulkhead("pull", &["--creds", CREDENTIALS, name]) };
    let refused = |name: &str| host.refusal("pull", &["--creds", CREDENTIALS, name]);

    let said = host.refusal("pull", &[&name])?;
    assert!(
        said.contains("credentials") && said.contains(&name),
        "{said}"
    );
    let said = refused(&format!("{}/team/app:2", registry.address))?;
    assert!(said.contains("team/app:2"), "{said}");

    // What the registry has is not what its name says.
    let file = registry.file(&layer);
    let mut changed = layer_bytes.clone();
    changed[1000] ^= 1;
    for (bytes, why) in [
        (&changed[..], "has the digest"),
        (&layer_bytes[..5000], "5000"),
    ] {
        fs::write(&file, bytes)?;
        let said = refused(&name)?;
        assert!(said.contains(&layer.to_string()), "{why}: {said}");
        let parts = host.kept()?;
        assert!(
            parts
                .iter()
                .all(|path| path.extension().is_some_and(|e| e == "part")),
            "{why}: {parts:?}"
        );
        host.bulkhead("prune", &[])?;
        assert!(host.kept()?.is_empty());
    }
    fs::write(&file, &layer_bytes)?;

    // A fetch that was cut off goes on where it ended.
    let downloads = host.store().join("downloads");
    fs::create_dir_all(&downloads)?;
    let part = downloads.join(layer.hex() + ".part");
    fs::write(&part, &layer_bytes[..layer_bytes.len() / 2])?;
    let id = with(&name)?;
    assert!(registry.log()?.contains("\" 206 "), "{}", registry.log()?);
    assert!(!part.exists());

    let pinned = format!("{}/team/app@{digest}", registry.address);
    assert_eq!(with(&pinned)?, id);
    let file = host
        .store()
        .parent()
        .context("no parent")?
        .join("auth.json");
    // me:secret
    let auths = json!({"auths": {&registry.address: {"auth": "bWU6c2VjcmV0"}}});
    fs::write(&file, auths.to_string())?;
    let auth_file = file.display().to_string();
    assert_eq!(
        host.bulkhead("pull", &["--authfile", &auth_file, &name])?,
        id
    );

    let list = host.bulkhead("images", &["--format", "json"])?;
    let list: Value = serde_json::from_str(&list)?;
    assert_eq!(list[0]["names"], json!([name, pinned]));
    assert_eq!(list[0]["digests"][0], json!(digest));
    let table = host.bulkhead("images", &[])?;
    assert!(table.contains("2020-09-13"), "{table}");
    let said = host.bulkhead("rmi", &[&name, &pinned])?;
    assert!(said.contains("Deleted: "), "{said}");
    assert_eq!(host.kept()?, [host.store().join("names.json")]);

    // Who waits at a terminal sees how far it is, and at last only the id.
    let pull = host.command("pull", &["--creds", CREDENTIALS, &name])?;
    let mut terminal = Terminal::start(pull, 30, 90)?;
    terminal.shows(&format!("{} ", &layer.hex()[..12]))?;
    let (status, shown) = terminal.end()?;
    ensure!(
        status == 0 && shown.ends_with(&id.replace('\n', "\r\n")),
        "{shown:?}"
    );
    Ok(())
}

/// An image for an architecture, whose only file says which it is.
fn image(architecture: &str, content: &str) -> Result<Layout> {
    let mut layout = Layout::new()?;
    layout.layer(Packing::Gzip, |root| {
        Ok(fs::write(root.join("file"), content)?)
    })?;
    layout.save_for(architecture, &json!({"Cmd": ["/file"]}))?;
    Ok(layout)
}

/// An entry of an index, for a kind of machine, `architecture/variant` of Linux.
fn entry(manifest: &Value, platform: &str) -> Value {
    let (architecture, variant) = platform.split_once('/').unwrap_or((platform, ""));
    let mut entry = manifest.clone();
    entry["platform"] = json!({"os": "linux", "architecture": architecture});
    match (architecture, variant) {
        ("unknown", _) => entry["platform"]["os"] = json!("unknown"),
        (_, "") => {}
        (_, variant) => entry["platform"]["variant"] = json!(variant),
    }
    entry
}

fn index(kind: &str, entries: &[Value]) -> Value {
    json!({"schemaVersion": 2, "mediaType": kind, "manifests": entries})
}

#[test]
fn an_index_leads_to_the_image_for_these_machines() -> Result<()> {
    const REPOSITORY: &str = "team/multi";
    let registry = Registry::start(Speech::Open)?;
    let named = |tag: &str| format!("{}/{REPOSITORY}{tag}", registry.address);
    let pull = |host: &Host, tag: &str| host.bulkhead("pull", &[&named(tag)]);
    for (kind, form) in [(OCI_INDEX, "oci"), (DOCKER_LIST, "v2s2")] {
        let host = Host::new()?;
        let image = |architecture: &str, content: &str| -> Result<Value> {
            let layout = image(architecture, content)?;
            let tag = format!("{REPOSITORY}:{content}");
            registry.push_as(form, &layout, &tag)?;
            registry.manifest(REPOSITORY, content)
        };
        let [ours, newer, arm] =
            [("amd64", "ours"), ("amd64", "newer"), ("arm64", "arm")].map(|(a, c)| image(a, c));
        let (ours, newer, arm) = (ours?, newer?, arm?);
        let digest = |entry: &Value| entry["digest"].as_str().map(|digest| format!("@{digest}"));
        let ours_by_digest = digest(&ours).context("no digest")?;
        let id = pull(&host, &ours_by_digest)?;

        // Of all that it lists, the one that runs on every machine of ours.
        let entries = [
            entry(&arm, "unknown"),
            entry(&arm, "arm64/v8"),
            entry(&newer, "amd64/v3"),
            entry(&ours, "amd64"),
        ];
        let whole = registry.put(REPOSITORY, "all", &index(kind, &entries))?;
        assert_eq!(pull(&host, ":all")?, id);
        let pinned = digest(&whole).context("no digest")?;
        assert_eq!(pull(&host, &pinned)?, id);
        let list: Value = serde_json::from_str(&host.bulkhead("images", &["--format", "json"])?)?;
        assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
        assert!(list[0]["names"].to_string().contains(&pinned), "{list}");

        // An index in an index, but not without end.
        let mut inner = whole;
        for depth in 2..5 {
            let outer = index(kind, &[entry(&arm, "arm64/v8"), entry(&inner, "amd64")]);
            inner = registry.put(REPOSITORY, "deep", &outer)?;
            match depth {
                2 | 3 => assert_eq!(pull(&host, ":deep")?, id, "{depth}"),
                _ => {
                    let said = host.refusal("pull", &[&named(":deep")])?;
                    assert!(said.contains("an index leads to an index"), "{said}");
                }
            }
        }

        // What is not for us is refused before any of its layers comes.
        let host = Host::new()?;
        let others = [
            entry(&arm, "unknown"),
            entry(&arm, "arm64/v8"),
            entry(&arm, "arm/v7"),
        ];
        registry.put(REPOSITORY, "others", &index(kind, &others))?;
        registry.put(REPOSITORY, "said", &index(kind, &others[..1]))?;
        let arm_by_digest = digest(&arm).context("no digest")?;
        for (tag, why) in [
            (
                ":others",
                "not for linux/amd64 but for linux/arm64/v8, linux/arm/v7\n",
            ),
            (":said", "there is no image"),
            (&arm_by_digest, "not for linux/amd64 but for linux/arm64\n"),
            (":arm", "not for linux/amd64 but for linux/arm64\n"),
        ] {
            let said = host.refusal("pull", &[&named(tag)])?;
            assert!(said.contains(why), "{tag}: {said}");
            assert!(host.kept()?.is_empty(), "{tag}: {:?}", host.kept()?);
        }

        // The registry has another manifest than its index lists.
        let declared: Digest = ours_by_digest[1..].parse()?;
        let mut changed = fs::read(registry.file(&declared))?;
        changed.push(b' ');
        fs::write(registry.file(&declared), changed)?;
        for tag in [":all", &ours_by_digest] {
            let said = host.refusal("pull", &[&named(tag)])?;
            assert!(said.contains(&declared.to_string()), "{tag}: {said}");
            assert!(host.kept()?.is_empty(), "{tag}");
        }
    }
    Ok(())
}
