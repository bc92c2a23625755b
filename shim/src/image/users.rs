//! Users of an image: `user`, `user:group`, by names or numbers, as the image's own files have
//! them.

/// Why a user cannot be found.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// No such user.
    #[error("the image has no user {0:?} in /etc/passwd; give a number")]
    User(String),
    /// No such group.
    #[error("the image has no group {0:?} in /etc/group; give a number")]
    Group(String),
}

/// A user as a process has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Further groups.
    pub additional_gids: Vec<u32>,
    /// The home directory, where the image knows one.
    pub home: Option<String>,
}

/// Looks `text` up in the texts of `/etc/passwd` and `/etc/group`; empty is root.
///
/// A user by name or number gets the groups that list it, unless a group is named.
///
/// # Errors
/// When a name is not there.
pub fn resolve(text: &str, passwd: &str, group: &str) -> Result<User, Error> {
    let (user, named_group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let entry = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let &[name, _, uid, gid, _, home, ..] = &fields[..] else {
            return None;
        };
        let entry = (
            name,
            uid.parse::<u32>().ok()?,
            gid.parse::<u32>().ok()?,
            home,
        );
        // A name first, as everywhere: there are users whose names are numbers.
        (name == user || user.parse() == Ok(entry.1)).then_some(entry)
    });
    let (name, uid, gid, home) = match (entry, user.parse::<u32>()) {
        (Some((name, uid, gid, home)), _) => (name, uid, gid, Some(home)),
        (None, Ok(uid)) => ("", uid, 0, None),
        (None, Err(_)) => return Err(Error::User(user.to_owned())),
    };
    let groups = || {
        group.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let &[name, _, gid, members, ..] = &fields[..] else {
                return None;
            };
            Some((name, gid.parse::<u32>().ok()?, members))
        })
    };
    let (gid, additional_gids) = match named_group {
        Some(wanted) => {
            let found =
                groups().find(|(name, gid, _)| *name == wanted || wanted.parse() == Ok(*gid));
            let gid = found.map(|(_, gid, _)| gid).or_else(|| wanted.parse().ok());
            (
                gid.ok_or_else(|| Error::Group(wanted.to_owned()))?,
                Vec::new(),
            )
        }
        None => {
            let listed = groups().filter(|(_, _, members)| {
                !name.is_empty() && members.split(',').any(|member| member == name)
            });
            (gid, listed.map(|(_, gid, _)| gid).collect())
        }
    };
    Ok(User {
        uid,
        gid,
        additional_gids,
        home: home.filter(|home| !home.is_empty()).map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
                          broken line\n\
                          web:x:33:34:Web:/srv/www:/usr/sbin/nologin\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\nlogs:x:50:other,web\nstaff:x:60:web\n";

    fn ids(text: &str) -> Result<(u32, u32, Vec<u32>), Error> {
        let user = resolve(text, PASSWD, GROUP)?;
        Ok((user.uid, user.gid, user.additional_gids))
    }

    #[test]
    fn names_and_numbers_are_looked_up() {
        assert_eq!(ids(""), Ok((0, 0, vec![])));
        assert_eq!(ids("web"), Ok((33, 34, vec![50, 60])));
        assert_eq!(ids("33"), Ok((33, 34, vec![50, 60])));
        assert_eq!(ids("web:logs"), Ok((33, 50, vec![])));
        assert_eq!(ids("web:7"), Ok((33, 7, vec![])));
        assert_eq!(ids("1000"), Ok((1000, 0, vec![])));
        assert_eq!(ids("1000:staff"), Ok((1000, 60, vec![])));
        let home = |text| resolve(text, PASSWD, GROUP).unwrap().home;
        assert_eq!(home("web").as_deref(), Some("/srv/www"));
        assert_eq!(home("1000"), None);
    }

    #[test]
    fn names_that_are_not_there_are_told() {
        assert_eq!(ids("nobody"), Err(Error::User("nobody".to_owned())));
        assert_eq!(ids("web:nogroup"), Err(Error::Group("nogroup".to_owned())));
        assert_eq!(ids("-1"), Err(Error::User("-1".to_owned())));
    }

    proptest! {
        #[test]
        fn any_texts_give_a_user_or_an_error(text in ".{0,12}", passwd in "[a:0-9\n]{0,60}", group in "[a:,0-9\n]{0,60}") {
            let _ = resolve(&text, &passwd, &group);
        }
    }
}
