//! Real programs on a shared directory: a Debian root file system as containerd would mount it, an
//! overlay on the host. `make test-long`; about half an hour in the lab.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use system_tests::{
    guest::{Guest, Plan},
    scratch,
};
use tempfile::TempDir;
use vmm::config::{DeviceConfig, Resource};

/// What one step may take in the lab.
const PATIENCE: Duration = Duration::from_secs(900);

/// A guest with Debian's root file system on /debian.
struct Debian {
    guest: Guest,
    merged: PathBuf,
    _directory: TempDir,
}

impl Debian {
    fn start() -> Result<Self> {
        let lower = std::env::var("BULKHEAD_DEBIAN")
            .context("BULKHEAD_DEBIAN is not set: run the long tests by `make test-long`")?;
        let directory = scratch::directory()?;
        let [upper, work, merged] =
            ["upper", "work", "merged"].map(|name| directory.path().join(name));
        for path in [&upper, &work, &merged] {
            fs::create_dir(path)?;
        }
        let (upper, work) = (upper.display(), work.display());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        mount(
            Some("debian"),
            &merged,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )?;
        let guest = Guest::start(Plan {
            memory_mib: 768,
            devices: vec![DeviceConfig::Fs {
                tag: "debian".to_owned(),
                directory: Resource::Path(merged.clone()),
                read_only: false,
            }],
            ..Plan::default()
        })?;
        let mut debian = Self {
            guest,
            merged,
            _directory: directory,
        };
        debian
            .guest
            .sh("mkdir -p /tmp /debian && mount -t virtiofs debian /debian")?;
        for mounted in [
            "proc none /debian/proc",
            "sysfs none /debian/sys",
            "devtmpfs none /debian/dev",
            "tmpfs none /debian/run",
        ] {
            debian.guest.sh(&format!("mount -t {mounted}"))?;
        }
        debian
            .guest
            .sh("mkdir -p /debian/dev/shm && mount -t tmpfs none /debian/dev/shm")?;
        debian
            .guest
            .sh("ip link set lo up; mkdir -p /debian/srv /debian/run/postgresql")?;
        Ok(debian)
    }

    /// Runs a script in Debian's shell; it ends at the first command that fails.
    fn run(&mut self, script: &str) -> Result<String> {
        let name = self.merged.join("script");
        fs::write(
            &name,
            format!(
                "set -eu\nexport HOME=/root LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin\n{script}"
            ),
        )?;
        // The guest may believe for a second that the old script is still there.
        self.guest.sh("sleep 1.1")?;
        let command = "chroot /debian /bin/bash /script > /tmp/out 2>&1; s=$?; tail -n 40 /tmp/out; [ $s = 0 ]";
        let printed = self.guest.sh_within(PATIENCE, command);
        printed.with_context(|| script.to_owned())
    }

    /// How many messages the shared directory has answered.
    fn messages(&self) -> Result<u64> {
        let devices = self.guest.control()?.counters()?.devices;
        let shares = devices.iter().filter(|device| device.kind == "fs");
        Ok(shares.map(|share| share.counted.requests).sum())
    }
}

impl Drop for Debian {
    fn drop(&mut self) {
        // The guest goes before its directory does, whatever order these are dropped in.
        let _ = self.guest.vmm().kill();
        let _ = umount2(&self.merged, MntFlags::MNT_DETACH);
    }
}

#[test]
fn git_clones_and_checks_a_repository() -> Result<()> {
    let mut debian = Debian::start()?;
    let printed = debian.run(
        r#"
git config --global user.name Tester; git config --global user.email t@localhost
mkdir /srv/one; cd /srv/one; git init -q .
for i in $(seq 5); do
    mkdir -p d$i/e; for j in $(seq 30); do seq $((i * j)) > d$i/e/f$j; done
    ln -s f1 d$i/e/link; chmod +x d$i/e/f2
    git add -A; git commit -qm "commit $i"
done
git clone -q file:///srv/one /srv/two
cd /srv/two
git fsck --full --strict
[ -z "$(git status --porcelain)" ]
git checkout -q -b side HEAD~2; git mv d1 moved; git commit -qam moved
git merge -q -m merged origin/HEAD; git gc -q --aggressive --prune=now
git fsck --full --strict; git log --oneline | wc -l
"#,
    )?;
    ensure!(printed.trim_end().ends_with('7'), "{printed}");
    Ok(())
}

#[test]
fn sqlite_loses_nothing_that_it_confirmed_when_it_is_killed() -> Result<()> {
    let mut debian = Debian::start()?;
    for mode in ["delete", "wal", "truncate"] {
        debian.run(&format!(
            r#"
cd /srv; rm -f db*
sqlite3 db 'pragma journal_mode={mode}; create table t(i integer primary key, x);' > /dev/null
for round in 1 2 3; do
    from=$(sqlite3 db 'select coalesce(max(i), 0) + 1 from t')
    seq $from 1000000 | sed 's/.*/insert into t values(&, hex(randomblob(200))); select &;/' |
        sqlite3 db > confirmed 2> errors &
    sleep 3
    pkill -9 sqlite3 || true; wait || true
    [ "$(sqlite3 db 'pragma integrity_check')" = ok ]
    last=$(grep -x '[0-9]*' confirmed | tail -n 1)
    in=$(sqlite3 db 'select max(i) from t')
    echo "{mode}: confirmed ${{last:-none}}, found $in"
    [ "$in" -ge "${{last:-0}}" ] && [ "$in" -gt "$from" ]
    [ "$(sqlite3 db 'select count(*) from t')" = "$in" ]
done
"#
        ))?;
    }
    Ok(())
}

#[test]
fn copies_of_a_tree_are_the_same_in_every_byte_and_attribute() -> Result<()> {
    let mut debian = Debian::start()?;
    debian.run(
        r#"
mkdir -p /srv/tree; cd /srv/tree
cp -a /etc /usr/share/perl5/Debconf .
head -c 3000000 /dev/urandom > big; ln big hard; ln -s big soft; ln -s /nowhere dangling
truncate -s 50M sparse; printf end >> sparse
mkfifo pipe
touch "$(printf 'odd \n\t\377 name')" "$(head -c 255 /dev/zero | tr '\0' n)"
install -m 6755 -o 33 -g 44 /bin/true set-ids
setcap cap_net_raw+ep set-ids || { cp /bin/true caps; setcap cap_net_raw+ep caps; }
setfattr -n user.note -v 'a value' big; setfacl -m u:33:rw,g:44:r big
mkdir acl; setfacl -d -m u:33:rwx acl; touch acl/inherits; chmod 3777 acl
touch -d '1999-12-31 23:59:59.123456789' big; chown 4000000:5000000 soft -h

rsync -aHAX --sparse /srv/tree/ /srv/by-rsync/
differ=$(rsync -aHAXin --checksum --delete /srv/tree/ /srv/by-rsync/)
[ -z "$differ" ] || { echo "$differ"; exit 1; }

tar --acls --xattrs --xattrs-include='*' --sparse -cf /run/tree.tar .
mkdir /srv/by-tar
tar --acls --xattrs --xattrs-include='*' -xpf /run/tree.tar -C /srv/by-tar
differ=$(rsync -aHAXin --checksum --delete /srv/tree/ /srv/by-tar/)
[ -z "$differ" ] || { echo "$differ"; exit 1; }

# To the guest's memory, another file system, and back.
mkdir /run/there; rsync -aHAX --sparse /srv/tree/ /run/there/
rsync -aHAX --sparse /run/there/ /srv/back/
differ=$(rsync -aHAXin --checksum --delete /srv/tree/ /srv/back/)
[ -z "$differ" ] || { echo "$differ"; exit 1; }
[ "$(stat -c %i /srv/back/big)" = "$(stat -c %i /srv/back/hard)" ]
[ "$(stat -c %b /srv/back/sparse)" -lt 1000 ]
getcap -r /srv/back | grep -c cap_net_raw
rm -rf /srv/tree /srv/by-rsync /srv/by-tar /srv/back
[ -z "$(ls /srv)" ]
"#,
    )?;
    Ok(())
}

#[test]
fn apt_installs_and_removes_a_local_package() -> Result<()> {
    let mut debian = Debian::start()?;
    debian.run(
        r#"
mkdir -p /srv/p/DEBIAN /srv/p/usr/bin /srv/p/etc
cat > /srv/p/DEBIAN/control <<END
Package: bulkhead-probe
Version: 1.0
Architecture: all
Maintainer: nobody <nobody@localhost>
Description: a package to install
END
echo /etc/probe.conf > /srv/p/DEBIAN/conffiles; echo setting > /srv/p/etc/probe.conf
printf '#!/bin/sh\necho probed\n' > /srv/p/usr/bin/probe; chmod 755 /srv/p/usr/bin/probe
printf '#!/bin/sh\nset -e\nadduser --system --no-create-home probe\n' > /srv/p/DEBIAN/postinst
chmod 755 /srv/p/DEBIAN/postinst
dpkg-deb --root-owner-group --build /srv/p /srv/probe.deb
apt-get install -y --no-install-recommends /srv/probe.deb
[ "$(probe)" = probed ]; id probe; dpkg -V bulkhead-probe; dpkg --audit
apt-get purge -y bulkhead-probe
[ ! -e /usr/bin/probe ] && [ ! -e /etc/probe.conf ]; dpkg --audit
"#,
    )?;
    Ok(())
}

#[test]
fn postgresql_recovers_when_it_is_killed_under_load() -> Result<()> {
    let mut debian = Debian::start()?;
    debian.run(
        r#"
bin=$(echo /usr/lib/postgresql/*/bin); chown postgres /run/postgresql
install -d -o postgres -m 700 /srv/data
as() { setpriv --reuid postgres --regid postgres --clear-groups "$@"; }
as $bin/initdb -D /srv/data -N > /dev/null
start() { as $bin/pg_ctl -D /srv/data -w -t 300 -l /srv/data/log start > /dev/null; }
sql() { as psql -qtAX -d postgres -c "$1"; }
start
sql 'create table t(i int primary key, x text)'
for round in 1 2; do
    from=$(sql 'select coalesce(max(i), 0) + 1 from t')
    seq $from 1000000 | sed 's/.*/insert into t values(&, md5(random()::text)); select &;/' |
        as psql -qtAX -d postgres > /srv/confirmed 2> /dev/null &
    until [ "$(sql 'select count(*) from t')" -ge $((from + 10)) ]; do sleep 1; done
    pkill -9 -u postgres postgres; wait || true
    rm -f /srv/data/postmaster.pid
    start
    last=$(grep -x '[0-9]*' /srv/confirmed | tail -n 1)
    in=$(sql 'select max(i) from t')
    echo "confirmed ${last:-none}, found $in"
    [ "$in" -ge "${last:-0}" ] && [ "$in" -gt "$from" ]
    [ "$(sql 'select count(*) from t')" = "$in" ]
    # each by itself: several at once are one transaction
    sql 'vacuum full t'; sql 'reindex table t'; sql checkpoint
done
as $bin/pg_ctl -D /srv/data -m fast stop > /dev/null
"#,
    )?;
    Ok(())
}

#[test]
fn a_file_of_more_than_4_gib_is_read_and_written_where_it_was_meant() -> Result<()> {
    let mut debian = Debian::start()?;
    debian.run(
        r#"
cd /srv; size=$((6 << 30))
for at in 0 $(((2 << 30) - 2)) $(((4 << 30) - 2)) $((5 << 30)); do
    printf %s "at $at" | dd of=large bs=1M oflag=seek_bytes seek=$at conv=notrunc status=none
done
truncate -s $size large; [ "$(stat -c %s large)" = $size ]
cp --sparse=always --reflink=never large copy
for file in large copy; do
    for at in 0 $(((2 << 30) - 2)) $(((4 << 30) - 2)) $((5 << 30)); do
        want="at $at"
        got=$(dd if=$file bs=1M iflag=skip_bytes,count_bytes skip=$at count=${#want} status=none)
        [ "$got" = "$want" ]
    done
done
printf end >> copy; [ "$(stat -c %s copy)" = $((size + 3)) ]; [ "$(tail -c 3 copy)" = end ]
truncate -s $(((4 << 30) + 1)) copy; [ "$(stat -c %s copy)" = $(((4 << 30) + 1)) ]
[ "$(du -m large | cut -f1)" -lt 10 ]
"#,
    )?;
    Ok(())
}

/// All but one in fifty are made by the host: each that the guest makes is four messages, tens of
/// milliseconds in a busy lab, and the directory is as large for either.
#[test]
fn a_hundred_thousand_names_are_in_one_directory() -> Result<()> {
    const COUNT: usize = 100_000;
    let mut debian = Debian::start()?;
    let check = scratch::program(env!("CARGO_BIN_EXE_fs-check"), &debian.merged.join("check"))?;
    let check = check.command("/check");
    let many = debian.merged.join("srv/many");
    fs::create_dir(&many)?;
    for i in (0..COUNT).filter(|i| i % 50 != 0) {
        fs::File::create(many.join(format!("name-{i:06}")))?;
    }
    // First where the right answer is known: in the guest's own memory.
    debian.run(&format!("{check} listing /run 1000"))?;
    for step in [
        "make",
        "list",
        "list-with-attributes",
        "list-in-turns",
        "look-up",
        "remove",
    ] {
        let printed = debian.run(&format!("{check} listing /srv {COUNT} {step}"))?;
        let of_share = debian.messages()?;
        eprintln!("{}; {of_share} messages so far", printed.trim_end());
        ensure!(
            printed.starts_with(&format!("{step}: {COUNT} names agree")),
            "{printed}"
        );
    }
    Ok(())
}
