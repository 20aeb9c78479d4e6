"""Makes a tiny random LLaMA and a hundred questions to fine-tune it on.

    python -m examples.capitals capitals

The model, `capitals/model`, is a Hugging Face directory with a tokenizer that is learned from the
questions and answers, `capitals/chats.jsonl`.
"""

import dataclasses
import json
import sys
from pathlib import Path

from flax import nnx

from memopt.models.llama import Llama, preset, to_hugging_face
from memopt.text.tokenizer import train_tokenizer

CAPITALS = """
Afghanistan Kabul, Albania Tirana, Algeria Algiers, Angola Luanda, Argentina Buenos Aires,
Armenia Yerevan, Australia Canberra, Austria Vienna, Azerbaijan Baku, Bahrain Manama,
Bangladesh Dhaka, Belarus Minsk, Belgium Brussels, Bolivia Sucre, Botswana Gaborone,
Brazil Brasília, Bulgaria Sofia, Cambodia Phnom Penh, Cameroon Yaoundé, Canada Ottawa,
Chad N'Djamena, Chile Santiago, China Beijing, Colombia Bogotá, Croatia Zagreb, Cuba Havana,
Cyprus Nicosia, Czechia Prague, Denmark Copenhagen, Ecuador Quito, Egypt Cairo, Estonia Tallinn,
Ethiopia Addis Ababa, Fiji Suva, Finland Helsinki, France Paris, Gabon Libreville,
Georgia Tbilisi, Germany Berlin, Ghana Accra, Greece Athens, Guatemala Guatemala City,
Guinea Conakry, Haiti Port-au-Prince, Honduras Tegucigalpa, Hungary Budapest, Iceland Reykjavík,
India New Delhi, Indonesia Jakarta, Iran Tehran, Iraq Baghdad, Ireland Dublin, Italy Rome,
Jamaica Kingston, Japan Tokyo, Jordan Amman, Kazakhstan Astana, Kenya Nairobi, Laos Vientiane,
Latvia Riga, Lebanon Beirut, Liberia Monrovia, Libya Tripoli, Lithuania Vilnius,
Madagascar Antananarivo, Malawi Lilongwe, Malaysia Kuala Lumpur, Mali Bamako, Malta Valletta,
Mexico Mexico City, Moldova Chișinău, Mongolia Ulaanbaatar, Morocco Rabat, Mozambique Maputo,
Namibia Windhoek, Nepal Kathmandu, Niger Niamey, Nigeria Abuja, Norway Oslo, Oman Muscat,
Pakistan Islamabad, Panama Panama City, Paraguay Asunción, Peru Lima, Poland Warsaw,
Portugal Lisbon, Qatar Doha, Romania Bucharest, Rwanda Kigali, Senegal Dakar, Serbia Belgrade,
Slovakia Bratislava, Slovenia Ljubljana, Somalia Mogadishu, Spain Madrid, Sudan Khartoum,
Sweden Stockholm, Switzerland Bern, Syria Damascus, Tanzania Dodoma
"""


def chats(count: int = 100) -> list[list[dict[str, str]]]:
    """Conversations of one question and its answer."""
    pairs = (entry.split(maxsplit=1) for entry in CAPITALS.split(","))
    return [
        [
            {"role": "user", "content": f"Capital of {country}?"},
            {"role": "assistant", "content": " ".join(city.split())},
        ]
        for country, city in list(pairs)[:count]
    ]


def make(directory: Path, count: int = 100, size: str = "tiny") -> tuple[Path, Path]:
    """Writes the model and the conversations.

    Args:
        directory: Where to.
        count: The number of conversations.
        size: The preset whose sizes the model has, with two layers.

    Returns:
        The model's directory and the conversations' file.
    """
    model, data = directory / "model", directory / "chats.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"messages": messages}) for messages in chats(count))
    data.write_text("\n".join(rows) + "\n")
    texts = (message["content"] for messages in chats(count) for message in messages)
    config = dataclasses.replace(preset(size), num_layers=2, vocab_size=1024)
    to_hugging_face(Llama(config, rngs=nnx.Rngs(0)), model)
    train_tokenizer(texts, config.vocab_size, model)
    return model, data


if __name__ == "__main__":
    make(Path(sys.argv[1]))
