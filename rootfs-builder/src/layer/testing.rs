//! Archives for tests.

/// A member to be.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    pub(crate) kind: u8,
    pub(crate) path: Vec<u8>,
    pub(crate) target: Vec<u8>,
    pub(crate) content: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) device: (u32, u32),
    pub(crate) records: Vec<(String, Vec<u8>)>,
}

impl Header {
    pub(crate) fn raw(kind: u8, path: &str, content: &[u8]) -> Self {
        Self {
            kind,
            path: path.into(),
            target: Vec::new(),
            content: content.to_owned(),
            mode: 0o644,
            owner: (0, 0),
            device: (0, 0),
            records: Vec::new(),
        }
    }

    pub(crate) fn file(path: &str, content: &[u8]) -> Self {
        Self::raw(b'0', path, content)
    }

    pub(crate) fn directory(path: &str) -> Self {
        Self {
            mode: 0o755,
            ..Self::raw(b'5', path, b"")
        }
    }

    pub(crate) fn symlink(path: &str, target: &str) -> Self {
        Self {
            target: target.into(),
            ..Self::raw(b'2', path, b"")
        }
    }

    pub(crate) fn hard_link(path: &str, target: &str) -> Self {
        Self {
            target: target.into(),
            ..Self::raw(b'1', path, b"")
        }
    }

    pub(crate) fn device(path: &str, device: (u32, u32)) -> Self {
        Self {
            device,
            ..Self::raw(b'3', path, b"")
        }
    }

    pub(crate) fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    pub(crate) fn pax(mut self, keyword: &str, value: &[u8]) -> Self {
        self.records.push((keyword.to_owned(), value.to_owned()));
        self
    }

    fn write(&self, archive: &mut Vec<u8>) {
        if !self.records.is_empty() {
            let records = self
                .records
                .iter()
                .map(|(keyword, value)| record(keyword, value));
            Self::raw(b'x', "pax", &records.collect::<Vec<_>>().concat()).write(archive);
        }
        let mut header = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.path);
        put(100, format!("{:07o}\0", self.mode).as_bytes());
        put(108, format!("{:07o}\0", self.owner.0).as_bytes());
        put(116, format!("{:07o}\0", self.owner.1).as_bytes());
        put(124, format!("{:011o}\0", self.content.len()).as_bytes());
        put(136, b"00000000000\0");
        put(156, &[self.kind]);
        put(157, &self.target);
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}\0", self.device.0).as_bytes());
        put(337, format!("{:07o}\0", self.device.1).as_bytes());
        seal(&mut header);
        archive.extend(header);
        archive.extend(&self.content);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
}

/// One record of an extended header, whose length counts itself.
fn record(keyword: &str, value: &[u8]) -> Vec<u8> {
    let rest = [b" ", keyword.as_bytes(), b"=", value, b"\n"].concat();
    let mut length = rest.len();
    while length != rest.len() + length.to_string().len() {
        length = rest.len() + length.to_string().len();
    }
    [length.to_string().as_bytes(), &rest].concat()
}

/// Puts the right checksum into a header.
pub(crate) fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header[..512].iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// An archive with its end mark.
pub(crate) fn archive(members: &[Header]) -> Vec<u8> {
    let mut archive = Vec::new();
    for member in members {
        member.write(&mut archive);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}
