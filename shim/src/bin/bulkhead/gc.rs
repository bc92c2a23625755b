//! `bulkhead gc`: removes what killed processes of bulkhead left behind.

use std::path::Path;

use shim::{id::Namespace, oci::Home, task::STATE_ROOT};

use super::{
    cli::{Global, ROOT},
    home,
    say::say,
};

/// Removes it, and says what it was: of this root and namespace, and, where no other root was named,
/// of containerd's namespace of that name.
pub(crate) fn gc(global: &Global) -> anyhow::Result<u8> {
    let mut homes = vec![home(global)?];
    if global.root == Path::new(ROOT) {
        let namespace = Namespace::parse(&global.namespace)?;
        homes.push(Home::new(Path::new(STATE_ROOT), &namespace));
    }
    for home in homes {
        for id in home.collect()? {
            say(id)?;
        }
    }
    Ok(0)
}
