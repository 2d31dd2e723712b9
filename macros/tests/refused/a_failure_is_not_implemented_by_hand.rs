use hopline::{Codec, Error, Failure};

struct Full;

impl Failure for Full {
    type Error = Error;

    fn into_failure(self, _: Codec) -> Result<Vec<u8>, hopline::service::Failed> {
        unimplemented!()
    }

    fn read(_: Codec, _: &[u8]) -> Error {
        unimplemented!()
    }
}

fn main() {}
