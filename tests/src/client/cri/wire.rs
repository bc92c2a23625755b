//! Protobuf's wire format, as much of it as the calls need.

use anyhow::{Context, Result, bail};

/// A message being written.
#[derive(Debug, Default, Clone)]
pub struct Message(Vec<u8>);

/// A message that was read: its fields, in their order.
#[derive(Debug, Default)]
pub struct Fields(Vec<(u64, Value)>);

#[derive(Debug)]
enum Value {
    Number(u64),
    Bytes(Vec<u8>),
}

impl Message {
    /// Adds a number.
    pub fn number(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    /// Adds a text.
    pub fn text(self, field: u64, value: &str) -> Self {
        self.field(field, value.as_bytes())
    }

    /// Adds a message.
    pub fn message(self, field: u64, value: &Self) -> Self {
        self.field(field, &value.0)
    }

    /// Adds an entry of a map, or a key with its value.
    pub fn entry(self, field: u64, key: &str, value: &str) -> Self {
        self.message(field, &Self::default().text(1, key).text(2, value))
    }

    /// As it is sent.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn field(mut self, field: u64, value: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

impl Fields {
    /// Reads a message.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(mut bytes: &[u8]) -> Result<Self> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes)?;
            let value = match key & 7 {
                0 => Value::Number(varint(&mut bytes)?),
                2 => {
                    let length = usize::try_from(varint(&mut bytes)?)?;
                    let (value, rest) = bytes.split_at_checked(length).context("cut short")?;
                    bytes = rest;
                    Value::Bytes(value.to_owned())
                }
                other => bail!("wire type {other}"),
            };
            fields.push((key >> 3, value));
        }
        Ok(Self(fields))
    }

    /// A number; 0 if there is none.
    ///
    /// # Errors
    /// When the field is none.
    pub fn number(&self, field: u64) -> Result<u64> {
        match self.get(field) {
            None => Ok(0),
            Some(Value::Number(value)) => Ok(*value),
            Some(other) => bail!("field {field} is {other:?}"),
        }
    }

    /// A text; empty if there is none.
    ///
    /// # Errors
    /// When the field is none.
    pub fn text(&self, field: u64) -> Result<String> {
        let bytes = self.bytes(field)?;
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    /// A message; empty if there is none.
    ///
    /// # Errors
    /// When the field is none.
    pub fn message(&self, field: u64) -> Result<Self> {
        Self::parse(self.bytes(field)?)
    }

    /// How often a field is there.
    pub fn count(&self, field: u64) -> usize {
        let same = self.0.iter().filter(|(number, _)| *number == field);
        same.count()
    }

    fn bytes(&self, field: u64) -> Result<&[u8]> {
        match self.get(field) {
            None => Ok(&[]),
            Some(Value::Bytes(value)) => Ok(value),
            Some(other) => bail!("field {field} is {other:?}"),
        }
    }

    fn get(&self, field: u64) -> Option<&Value> {
        let found = self.0.iter().find(|(number, _)| *number == field);
        found.map(|(_, value)| value)
    }
}

fn varint(bytes: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first().context("cut short")?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    bail!("a number of too many bytes")
}
