#[hopline::service]
trait Demo {
    #[rpc(retry = 0)]
    async fn get(&self) -> u8;
    #[rpc(retry = "2")]
    async fn take(&self) -> u8;
    #[rpc(retry)]
    async fn fetch(&self) -> u8;
}

fn main() {}
