//! Making calls without a service trait.

use serde::{Deserialize, Serialize};

use super::{Call, Oneway};
use crate::client::Client;
use crate::codec::{Codec, CodecError};

impl Client {
    /// A call without a service trait: `service` is `name` or `name.vMAJOR`, `args` whatever serializes as an array: a
    /// tuple, an array, a `Vec`.
    pub fn call<R>(&self, service: &str, method: &str, args: impl Serialize + Send + 'static) -> Call<R>
    where
        // `DeserializeOwned` spelled out: of this, rustc tells what to derive.
        R: for<'de> Deserialize<'de> + Send + 'static,
    {
        Call::new(self.clone(), self.target(service, method), args, Codec::decode)
    }

    /// A oneway call without a service trait, to be [sent](Call::send).
    pub fn oneway(&self, service: &str, method: &str, args: impl Serialize + Send + 'static) -> Call<Oneway> {
        let no_result = |_: Codec, _: &[u8]| Err(CodecError("a oneway call has no result".to_owned()));
        Call::new(self.clone(), self.target(service, method), args, no_result)
    }
}
