#[hopline::service]
trait Demo {
    #[rpc(cache = "5s")]
    async fn get(&self) -> u8;
    #[rpc(idempotent, cache = "0s")]
    async fn take(&self) -> u8;
    #[rpc(idempotent, cache = 5)]
    async fn fetch(&self) -> u8;
    #[rpc(idempotent, stale = "30s")]
    async fn read(&self) -> u8;
}

fn main() {}
