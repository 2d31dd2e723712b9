#[hopline::service]
trait Demo {
    #[rpc(oneway)]
    async fn put(&self) -> u8;
    #[rpc(oneway)]
    async fn set(&self) -> Result<u8, u8>;
}

fn main() {}
