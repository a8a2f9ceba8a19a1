#include "captions_lexicon.h"

#include <algorithm>
#include <utility>

namespace remnant::app::captions {
namespace {

constexpr Gender M = Gender::masculine, F = Gender::feminine, N = Gender::neuter;

struct Row {
  Gender gender;
  const char* singular;
  const char* plural;  ///< "" if only the singular is used
  const char* english;
  const char* english_plural;  ///< "" if regular
  uint32_t domain;
  /// Tags, and marks: "he", "she"; "-n", "-en" (weak declension); "+adj", "+mass", "+pl" (see Noun).
  const char* tags;
};

constexpr Row rows[] = {
    // People.
    {M, "Mann", "Männer", "man", "men", person, "human he"},
    {F, "Frau", "Frauen", "woman", "women", person, "human she"},
    {M, "Junge", "Jungen", "boy", "", person, "human young he -n"},
    {N, "Mädchen", "Mädchen", "girl", "", person, "human young she"},
    {N, "Kind", "Kinder", "child", "children", person, "human young"},
    {N, "Baby", "Babys", "baby", "", person, "infant"},
    {F, "Dame", "Damen", "lady", "", person, "human she"},
    {M, "Jugendlich", "Jugendlich", "teenager", "", person, "human he +adj"},
    {M, "Erwachsen", "Erwachsen", "adult", "", person, "human he +adj"},
    {M, "Vater", "Väter", "father", "", person, "human kin he"},
    {F, "Mutter", "Mütter", "mother", "", person, "human kin she"},
    {M, "Großvater", "Großväter", "grandfather", "", person, "human kin he"},
    {F, "Großmutter", "Großmütter", "grandmother", "", person, "human kin she"},
    {M, "Bruder", "Brüder", "brother", "", person, "kin he"},
    {F, "Schwester", "Schwestern", "sister", "", person, "kin she"},
    {M, "Sohn", "Söhne", "son", "", person, "kin he offspring"},
    {F, "Tochter", "Töchter", "daughter", "", person, "kin she offspring"},
    {M, "Onkel", "Onkel", "uncle", "", person, "kin he"},
    {F, "Tante", "Tanten", "aunt", "", person, "kin she"},
    {M, "Freund", "Freunde", "friend", "", person, "kin he"},
    {M, "Nachbar", "Nachbarn", "neighbor", "", person, "kin he -n"},
    {M, "Arbeiter", "Arbeiter", "worker", "", person, "human he"},
    {M, "Koch", "Köche", "cook", "", person, "human he"},
    {M, "Bäcker", "Bäcker", "baker", "", person, "human he"},
    {M, "Lehrer", "Lehrer", "teacher", "", person, "human he"},
    {M, "Polizist", "Polizisten", "policeman", "policemen", person, "human he -en"},
    {M, "Feuerwehrmann", "Feuerwehrleute", "firefighter", "", person, "human he"},
    {M, "Soldat", "Soldaten", "soldier", "", person, "human he -en"},
    {M, "Student", "Studenten", "student", "", person, "human he -en"},
    {M, "Tourist", "Touristen", "tourist", "", person, "human he -en"},
    {M, "Musiker", "Musiker", "musician", "", person, "human he"},
    {M, "Maler", "Maler", "painter", "", person, "human he"},
    {M, "Clown", "Clowns", "clown", "", person, "human he"},
    {M, "Bauer", "Bauern", "farmer", "", person, "human he -n"},
    {M, "Fischer", "Fischer", "fisherman", "fishermen", person, "human he"},
    {M, "Gärtner", "Gärtner", "gardener", "", person, "human he"},
    {M, "Kellner", "Kellner", "waiter", "", person, "human he"},
    {F, "Kellnerin", "Kellnerinnen", "waitress", "", person, "human she"},
    {F, "Schauspielerin", "Schauspielerinnen", "actress", "", person, "human she"},
    {M, "Schauspieler", "Schauspieler", "actor", "", person, "human he"},
    {F, "Krankenschwester", "Krankenschwestern", "nurse", "", person, "human she"},
    {M, "Arzt", "Ärzte", "doctor", "", person, "human he"},
    {M, "Verkäufer", "Verkäufer", "vendor", "", person, "human he"},
    {M, "Radfahrer", "Radfahrer", "cyclist", "", person, "human he"},
    {M, "Läufer", "Läufer", "runner", "", person, "human he"},
    {M, "Wanderer", "Wanderer", "hiker", "", person, "human he"},
    {M, "Fotograf", "Fotografen", "photographer", "", person, "human he -en"},
    {M, "Matrose", "Matrosen", "sailor", "", person, "human he -n"},
    {M, "Tänzer", "Tänzer", "dancer", "", person, "human he"},
    {M, "Sänger", "Sänger", "singer", "", person, "human he"},
    {M, "Trainer", "Trainer", "coach", "", person, "human he"},
    {M, "Reiter", "Reiter", "rider", "", person, "human he"},
    {M, "Skifahrer", "Skifahrer", "skier", "", person, "human he"},
    {M, "Mechaniker", "Mechaniker", "mechanic", "", person, "human he"},
    {M, "Künstler", "Künstler", "artist", "", person, "human he"},
    {M, "Leiter", "Leiter", "manager", "", person, "human he"},
    {M, "Besitzer", "Besitzer", "owner", "", person, "owner he"},
    // Several people as one: a singular verb in both languages, but "their".
    {F, "Familie", "Familien", "family", "", no_domain, "collective"},
    {N, "Paar", "Paare", "couple", "", no_domain, "collective"},
    {F, "Band", "Bands", "band", "", no_domain, "collective"},
    {F, "Menschenmenge", "", "crowd", "", no_domain, "collective"},
    {F, "Schulklasse", "Schulklassen", "school class", "", no_domain, "collective"},
    // Animals.
    {M, "Hund", "Hunde", "dog", "", animal, "animal pet chased washed"},
    {M, "Welpe", "Welpen", "puppy", "", animal, "animal pet chased washed -n"},
    {F, "Katze", "Katzen", "cat", "", animal, "animal pet chased"},
    {N, "Kätzchen", "Kätzchen", "kitten", "", animal, "animal pet"},
    {N, "Kaninchen", "Kaninchen", "rabbit", "", animal, "animal pet chased"},
    {N, "Pferd", "Pferde", "horse", "", animal, "animal pet ridden washed"},
    {M, "Esel", "Esel", "donkey", "", animal, "animal pet ridden"},
    {F, "Ziege", "Ziegen", "goat", "", animal, "animal pet"},
    {N, "Schaf", "Schafe", "sheep", "sheep", animal, "animal pet chased"},
    {F, "Kuh", "Kühe", "cow", "", animal, "animal pet"},
    {N, "Schwein", "Schweine", "pig", "", animal, "animal"},
    {M, "Elefant", "Elefanten", "elephant", "", animal, "animal ridden -en"},
    {N, "Kamel", "Kamele", "camel", "", animal, "animal ridden"},
    {M, "Affe", "Affen", "monkey", "", animal, "animal -n"},
    {M, "Bär", "Bären", "bear", "", animal, "animal -en"},
    {M, "Löwe", "Löwen", "lion", "", animal, "animal -n"},
    {M, "Wolf", "Wölfe", "wolf", "wolves", animal, "animal"},
    {M, "Fuchs", "Füchse", "fox", "", animal, "animal chased"},
    {F, "Maus", "Mäuse", "mouse", "mice", animal, "animal chased"},
    {N, "Huhn", "Hühner", "chicken", "", animal, "animal chased"},
    {F, "Ente", "Enten", "duck", "", animal, "animal chased"},
    {F, "Gans", "Gänse", "goose", "geese", animal, "animal chased"},
    {M, "Vogel", "Vögel", "bird", "", animal, "animal chased"},
    {N, "Eichhörnchen", "Eichhörnchen", "squirrel", "", animal, "animal chased"},
    // Things to read and write.
    {N, "Buch", "Bücher", "book", "", thing, "read write told flat thing"},
    {F, "Zeitung", "Zeitungen", "newspaper", "", thing, "read flat thing"},
    {F, "Zeitschrift", "Zeitschriften", "magazine", "", thing, "read flat thing"},
    {M, "Brief", "Briefe", "letter", "", thing, "read write told flat thing"},
    {N, "Gedicht", "Gedichte", "poem", "", no_domain, "read write told"},
    {F, "Geschichte", "Geschichten", "story", "", no_domain, "read write told story"},
    {F, "Landkarte", "Landkarten", "map", "", thing, "read view flat thing hung"},
    {F, "Speisekarte", "Speisekarten", "menu", "", thing, "read view flat"},
    {N, "Plakat", "Plakate", "poster", "", thing, "read view hung thing"},
    {N, "Schild", "Schilder", "sign", "", thing, "read hung thing"},
    // Food.
    {M, "Apfel", "Äpfel", "apple", "", food, "eat buy cut picked food"},
    {F, "Birne", "Birnen", "pear", "", food, "eat cut picked food"},
    {F, "Orange", "Orangen", "orange", "", food, "eat buy cut picked food"},
    {F, "Banane", "Bananen", "banana", "", food, "eat buy cut food"},
    {F, "Tomate", "Tomaten", "tomato", "tomatoes", food, "eat buy cut picked food"},
    {F, "Kartoffel", "Kartoffeln", "potato", "potatoes", food, "eat buy cut cook food"},
    {F, "Karotte", "Karotten", "carrot", "", food, "eat buy cut food"},
    {F, "Erdbeere", "Erdbeeren", "strawberry", "", food, "eat buy picked food"},
    {M, "Kuchen", "Kuchen", "cake", "", food, "eat buy cut bake food"},
    {N, "Brötchen", "Brötchen", "roll", "", food, "eat buy cut bake food"},
    {M, "Keks", "Kekse", "cookie", "", food, "eat buy bake food"},
    {F, "Pizza", "Pizzas", "pizza", "", food, "eat buy cut bake food"},
    {F, "Wurst", "Würste", "sausage", "", food, "eat buy cut cook food"},
    {N, "Ei", "Eier", "egg", "", food, "eat buy cook food"},
    {F, "Suppe", "Suppen", "soup", "", food, "eat cook"},
    {M, "Salat", "Salate", "salad", "", food, "eat buy"},
    {N, "Sandwich", "Sandwiches", "sandwich", "", food, "eat buy food"},
    {N, "Brot", "", "bread", "", food, "masseat massbuy massfood +mass"},
    {M, "Käse", "", "cheese", "", food, "masseat massbuy massfood +mass"},
    {M, "Reis", "", "rice", "", food, "masseat massbuy massfood +mass"},
    {F, "Schokolade", "", "chocolate", "", food, "masseat massbuy massfood +mass"},
    {N, "Obst", "", "fruit", "", food, "masseat massbuy massfood +mass"},
    {N, "Fleisch", "", "meat", "", food, "masseat massbuy massfood +mass"},
    {M, "Honig", "", "honey", "", food, "masseat massbuy +mass"},
    {M, "Kaffee", "", "coffee", "", drink, "drink massbuy +mass"},
    {M, "Tee", "", "tea", "", drink, "drink massbuy +mass"},
    {N, "Wasser", "", "water", "", drink, "drink +mass"},
    {M, "Saft", "", "juice", "", drink, "drink massbuy +mass"},
    {F, "Milch", "", "milk", "", drink, "drink massbuy +mass"},
    {N, "Bier", "", "beer", "", drink, "drink massbuy adults +mass"},
    {M, "Wein", "", "wine", "", drink, "drink massbuy adults +mass"},
    {F, "Limonade", "", "lemonade", "", drink, "drink massbuy +mass"},
    // Clothes. "inside" follows "in", "with" follows "mit"; "puton" goes with anziehen, "seton" with
    // aufsetzen.
    {N, "Hemd", "Hemden", "shirt", "", clothing, "wear inside puton washed buy hungup"},
    {N, "T-Shirt", "T-Shirts", "T-shirt", "", clothing, "wear inside puton washed buy"},
    {F, "Jacke", "Jacken", "jacket", "", clothing, "wear inside puton washed buy hungup"},
    {M, "Mantel", "Mäntel", "coat", "", clothing, "wear inside puton washed buy hungup"},
    {N, "Kleid", "Kleider", "dress", "", clothing, "wearshe insideshe buy washed hungup"},
    {M, "Rock", "Röcke", "skirt", "", clothing, "wearshe insideshe buy washed hungup"},
    {F, "Bluse", "Blusen", "blouse", "", clothing, "wearshe insideshe buy washed hungup"},
    {M, "Anzug", "Anzüge", "suit", "", clothing, "wear inside puton buy hungup"},
    {M, "Pullover", "Pullover", "sweater", "", clothing, "wear inside puton washed buy"},
    {F, "Weste", "Westen", "vest", "", clothing, "wear inside puton washed buy"},
    {F, "Uniform", "Uniformen", "uniform", "", clothing, "wear inside puton"},
    {F, "Schürze", "Schürzen", "apron", "", clothing, "wear inside washed"},
    {N, "Kostüm", "Kostüme", "costume", "", clothing, "wear inside buy"},
    {F, "Hose", "", "pants", "pants", clothing, "wear inside puton washed buy +pl"},
    {F, "Jeans", "", "jeans", "jeans", clothing, "wear inside puton washed buy +pl"},
    {F, "Brille", "", "glasses", "glasses", clothing, "wear with seton +pl"},
    {F, "Sonnenbrille", "", "sunglasses", "sunglasses", clothing, "wear with seton buy +pl"},
    {M, "Hut", "Hüte", "hat", "", clothing, "wear with seton buy"},
    {F, "Mütze", "Mützen", "cap", "", clothing, "wear with seton buy"},
    {M, "Helm", "Helme", "helmet", "", clothing, "wear with seton buy"},
    {F, "Krone", "Kronen", "crown", "", clothing, "wear with seton"},
    {F, "Perücke", "Perücken", "wig", "", clothing, "wear with seton"},
    {M, "Schal", "Schals", "scarf", "scarves", clothing, "wear with buy washed"},
    {F, "Maske", "Masken", "mask", "", clothing, "wear with buy"},
    {F, "Krawatte", "Krawatten", "tie", "", clothing, "wear with buy"},
    {M, "Rucksack", "Rucksäcke", "backpack", "", clothing, "wear with buy box unpack"},
    {F, "Halskette", "Halsketten", "necklace", "", clothing, "wear with buy"},
    {M, "Schuh", "Schuhe", "shoe", "", clothing, "wearmany fetch cleanmany"},
    {M, "Stiefel", "Stiefel", "boot", "", clothing, "wearmany cleanmany"},
    {M, "Handschuh", "Handschuhe", "glove", "", clothing, "wearmany"},
    {F, "Socke", "Socken", "sock", "", clothing, "wearmany"},
    {F, "Sandale", "Sandalen", "sandal", "", clothing, "wearmany"},
    // Things. "upright" stands (stellen, stehen), "flat" lies (legen, liegen), "hung" hangs.
    {M, "Ball", "Bälle", "ball", "", thing, "thing thrown caught chased fetch toy flat"},
    {M, "Stock", "Stöcke", "stick", "", thing, "thing thrown fetch over flat"},
    {M, "Stein", "Steine", "stone", "", thing, "thing thrown flat"},
    {M, "Schneeball", "Schneebälle", "snowball", "", thing, "thrown caught"},
    {N, "Frisbee", "Frisbees", "frisbee", "", thing, "thing thrown caught fetch"},
    {M, "Korb", "Körbe", "basket", "", thing, "thing upright box"},
    {F, "Kiste", "Kisten", "box", "", thing, "thing upright box opened unpack"},
    {M, "Koffer", "Koffer", "suitcase", "", thing, "thing upright box opened unpack pulled"},
    {F, "Tasche", "Taschen", "bag", "", thing, "thing box opened upright"},
    {M, "Eimer", "Eimer", "bucket", "", thing, "thing upright box"},
    {M, "Schlüssel", "Schlüssel", "key", "", thing, "thing flat"},
    {M, "Regenschirm", "Regenschirme", "umbrella", "", thing, "thing opened"},
    {F, "Kamera", "Kameras", "camera", "", thing, "thing repaired switched flat"},
    {F, "Blume", "Blumen", "flower", "", thing, "thing picked watered drawn"},
    {F, "Flasche", "Flaschen", "bottle", "", thing, "thing opened upright"},
    {F, "Vase", "Vasen", "vase", "", thing, "thing upright"},
    {M, "Topf", "Töpfe", "pot", "", thing, "thing upright"},
    {F, "Schüssel", "Schüsseln", "bowl", "", thing, "thing upright"},
    {F, "Kerze", "Kerzen", "candle", "", thing, "thing upright"},
    {F, "Lampe", "Lampen", "lamp", "", thing, "thing upright repaired switched"},
    {F, "Leiter", "Leitern", "ladder", "", thing, "thing leaned"},
    {N, "Seil", "Seile", "rope", "", thing, "thing over flat pulled"},
    {F, "Fahne", "Fahnen", "flag", "", thing, "thing hung"},
    {M, "Luftballon", "Luftballons", "balloon", "", thing, "thing caught"},
    {M, "Hammer", "Hämmer", "hammer", "", thing, "thing tool flat"},
    {M, "Besen", "Besen", "broom", "", thing, "thing tool"},
    {F, "Schaufel", "Schaufeln", "shovel", "", thing, "thing tool"},
    {F, "Säge", "Sägen", "saw", "", thing, "thing tool flat"},
    {N, "Messer", "Messer", "knife", "knives", thing, "tool flat"},
    {N, "Kissen", "Kissen", "pillow", "", thing, "thing flat"},
    {F, "Decke", "Decken", "blanket", "", thing, "thing flat washed"},
    {N, "Handtuch", "Handtücher", "towel", "", thing, "thing flat washed hungup"},
    {N, "Paket", "Pakete", "package", "", thing, "thing opened unpack flat"},
    {N, "Geschenk", "Geschenke", "present", "", thing, "thing opened unpack flat"},
    {N, "Bild", "Bilder", "picture", "", thing, "thing hung hungup drawn painted view"},
    {N, "Gemälde", "Gemälde", "painting", "", thing, "hung hungup view"},
    {N, "Foto", "Fotos", "photo", "", thing, "thing hung hungup view"},
    {M, "Spiegel", "Spiegel", "mirror", "", thing, "hung hungup"},
    {F, "Uhr", "Uhren", "clock", "", thing, "hung hungup repaired"},
    {F, "Puppe", "Puppen", "doll", "", thing, "thing toy flat"},
    {M, "Teddybär", "Teddybären", "teddy bear", "", thing, "thing toy -en"},
    {M, "Drachen", "Drachen", "kite", "", thing, "thing toy"},
    {N, "Schloss", "Schlösser", "lock", "", no_domain, "repaired"},
    {N, "Radio", "Radios", "radio", "", thing, "switched repaired upright"},
    {M, "Fernseher", "Fernseher", "television", "", thing, "switched repaired"},
    {M, "Computer", "Computer", "computer", "", thing, "switched repaired"},
    {F, "Maschine", "Maschinen", "machine", "", thing, "switched repaired cleaned"},
    {F, "Gitarre", "Gitarren", "guitar", "", thing, "thing repaired"},
    {F, "Trommel", "Trommeln", "drum", "", thing, "thing repaired"},
    // Vehicles. "driven" and "cycled" both are fahren; English tells driving from riding.
    {N, "Auto", "Autos", "car", "", vehicle, "driven boarded pushed repaired washed mark machine"},
    {M, "Bus", "Busse", "bus", "", vehicle, "driven boarded awaited washed mark"},
    {M, "Lastwagen", "Lastwagen", "truck", "", vehicle, "driven boarded repaired washed mark machine"},
    {M, "Traktor", "Traktoren", "tractor", "", vehicle, "driven repaired washed mark machine"},
    {N, "Taxi", "Taxis", "taxi", "", vehicle, "driven boarded awaited"},
    {M, "Zug", "Züge", "train", "", vehicle, "boarded awaited"},
    {F, "Straßenbahn", "Straßenbahnen", "tram", "", vehicle, "boarded awaited"},
    {N, "Fahrrad", "Fahrräder", "bicycle", "", vehicle, "cycled pushed repaired washed mark wheels"},
    {N, "Motorrad", "Motorräder", "motorcycle", "", vehicle, "cycled pushed repaired washed mark machine"},
    {M, "Roller", "Roller", "scooter", "", vehicle, "cycled pushed repaired"},
    {N, "Boot", "Boote", "boat", "", vehicle, "rowed repaired coated pulled built mark"},
    {M, "Schlitten", "Schlitten", "sled", "", vehicle, "pulled built"},
    {M, "Wagen", "Wagen", "cart", "", vehicle, "pulled pushed"},
    {M, "Kinderwagen", "Kinderwagen", "stroller", "", vehicle, "pushed"},
    {M, "Rollstuhl", "Rollstühle", "wheelchair", "", vehicle, "pushed"},
    {F, "Schubkarre", "Schubkarren", "wheelbarrow", "", vehicle, "pushed"},
    // Furniture and parts of houses.
    {M, "Tisch", "Tische", "table", "", furniture, "surface an desk coated built leaned"},
    {M, "Stuhl", "Stühle", "chair", "", furniture, "surface seat coated built"},
    {F, "Bank", "Bänke", "bench", "", furniture, "seat coated built bench"},
    {N, "Sofa", "Sofas", "couch", "", furniture, "surface seat bed"},
    {N, "Bett", "Betten", "bed", "", furniture, "surface bed"},
    {N, "Regal", "Regale", "shelf", "shelves", furniture, "surface built coated"},
    {M, "Teppich", "Teppiche", "carpet", "", furniture, "surface seat bed cleaned"},
    {M, "Hocker", "Hocker", "stool", "", furniture, "surface seat built"},
    {M, "Boden", "", "floor", "", no_domain, "ground swept cleaned"},
    {F, "Tür", "Türen", "door", "", furniture, "opened closed coated repaired leaned part"},
    {N, "Fenster", "Fenster", "window", "", furniture, "opened closed cleaned repaired an part windows"},
    {N, "Dach", "Dächer", "roof", "", no_domain, "part coated repaired auf"},
    {F, "Wand", "Wände", "wall", "", furniture, "inwall coated leaned"},
    {N, "Tor", "Tore", "gate", "", furniture, "opened closed coated repaired leaned"},
    {M, "Motor", "Motoren", "engine", "", no_domain, "enginepart repaired"},
    {N, "Rad", "Räder", "wheel", "", no_domain, "wheelpart repaired"},
    // Outdoors. "mark": one may stand vor, hinter, neben it.
    {M, "Baum", "Bäume", "tree", "", outdoor, "mark leaned climbed watered drawn outside"},
    {M, "Zaun", "Zäune", "fence", "", outdoor, "mark leaned over coated built repaired outside"},
    {F, "Mauer", "Mauern", "wall", "", outdoor, "mark leaned over built outside sitauf climbed"},
    {M, "Brunnen", "Brunnen", "fountain", "", outdoor, "mark view outside"},
    {F, "Statue", "Statuen", "statue", "", outdoor, "mark view outside"},
    {M, "Turm", "Türme", "tower", "", outdoor, "mark built climbed view outside"},
    {N, "Haus", "Häuser", "house", "", building, "mark in entered coated built drawn view whole"},
    {F, "Hütte", "Hütten", "cabin", "", building, "mark in entered built whole"},
    {F, "Kirche", "Kirchen", "church", "", building, "mark in entered view whole"},
    {F, "Schule", "Schulen", "school", "", building, "mark in entered whole"},
    {N, "Museum", "Museen", "museum", "", building, "mark in entered whole"},
    {N, "Restaurant", "Restaurants", "restaurant", "", building, "mark in entered"},
    {M, "Laden", "Läden", "store", "", building, "mark in entered shop"},
    {F, "Bäckerei", "Bäckereien", "bakery", "", building, "mark in entered shop"},
    {F, "Bank", "Banken", "bank", "", building, "in entered"},
    {N, "Schloss", "Schlösser", "castle", "", building, "mark view"},
    {N, "Gebäude", "Gebäude", "building", "", building, "mark entered view whole"},
    {N, "Zelt", "Zelte", "tent", "", building, "mark in setup"},
    {F, "Scheune", "Scheunen", "barn", "", building, "mark in entered built coated whole"},
    {N, "Krankenhaus", "Krankenhäuser", "hospital", "", building, "mark in entered"},
    {F, "Bibliothek", "Bibliotheken", "library", "", building, "in entered"},
    {M, "Schneemann", "Schneemänner", "snowman", "snowmen", outdoor, "built drawn mark"},
    {F, "Sandburg", "Sandburgen", "sandcastle", "", outdoor, "built"},
    {F, "Pfütze", "Pfützen", "puddle", "", no_domain, "over swim"},
    {M, "Graben", "Gräben", "ditch", "", no_domain, "over"},
    // Places. They take "in", "auf" or "an"; English at, by, on by mark.
    {M, "Park", "Parks", "park", "", place, "in through outdoor"},
    {M, "Garten", "Gärten", "garden", "", place, "in through watered outdoor"},
    {M, "Wald", "Wälder", "forest", "", place, "in through outdoor"},
    {F, "Stadt", "Städte", "city", "", place, "in through"},
    {N, "Dorf", "Dörfer", "village", "", place, "in through"},
    {M, "Hof", "Höfe", "courtyard", "", place, "in swept through outdoor"},
    {F, "Küche", "Küchen", "kitchen", "", room, "in tidied cleaned coated"},
    {N, "Zimmer", "Zimmer", "room", "", room, "in tidied cleaned coated entered"},
    {N, "Wohnzimmer", "Wohnzimmer", "living room", "", room, "in tidied cleaned"},
    {N, "Schlafzimmer", "Schlafzimmer", "bedroom", "", room, "in tidied cleaned"},
    {N, "Badezimmer", "Badezimmer", "bathroom", "", room, "in cleaned"},
    {N, "Büro", "Büros", "office", "", room, "in tidied cleaned entered"},
    {F, "Werkstatt", "Werkstätten", "workshop", "", room, "in tidied entered"},
    {F, "Garage", "Garagen", "garage", "", room, "in tidied"},
    {M, "Keller", "Keller", "basement", "", room, "in tidied"},
    {N, "Stadion", "Stadien", "stadium", "", place, "in entered"},
    {N, "Schwimmbad", "Schwimmbäder", "swimming pool", "", place, "in pool"},
    {N, "Gras", "", "grass", "", no_domain, "grass"},
    {F, "Straße", "Straßen", "street", "", place, "auf crossed swept ground_outside"},
    {F, "Brücke", "Brücken", "bridge", "", place, "auf crossed built view ground_outside"},
    {F, "Wiese", "Wiesen", "meadow", "", place, "auf crossed en-in ground_outside"},
    {N, "Feld", "Felder", "field", "", place, "auf crossed ground_outside"},
    {M, "Platz", "Plätze", "square", "", place, "auf crossed swept ground_outside"},
    {M, "Markt", "Märkte", "market", "", place, "auf en-at"},
    {M, "Spielplatz", "Spielplätze", "playground", "", place, "auf ground_outside"},
    {M, "Parkplatz", "Parkplätze", "parking lot", "", place, "auf crossed ground_outside"},
    {M, "Bürgersteig", "Bürgersteige", "sidewalk", "", place, "auf swept"},
    {M, "Hügel", "Hügel", "hill", "", place, "auf climbed ground_outside"},
    {M, "Balkon", "Balkone", "balcony", "", place, "auf"},
    {F, "Terrasse", "Terrassen", "terrace", "", place, "auf swept"},
    {F, "Treppe", "Treppen", "staircase", "", place, "auf swept"},
    {F, "Bühne", "Bühnen", "stage", "", place, "auf setup"},
    {F, "Baustelle", "Baustellen", "construction site", "", place, "auf"},
    {M, "Bauernhof", "Bauernhöfe", "farm", "", place, "auf ground_outside"},
    {M, "Bahnsteig", "Bahnsteige", "platform", "", place, "auf"},
    {F, "Insel", "Inseln", "island", "", place, "auf ground_outside"},
    {M, "Strand", "Strände", "beach", "", place, "an waterside"},
    {F, "Bushaltestelle", "Bushaltestellen", "bus stop", "", place, "an"},
    {F, "Kreuzung", "Kreuzungen", "intersection", "", place, "an"},
    {F, "Theke", "Theken", "counter", "", no_domain, "an cleaned"},
    {M, "See", "Seen", "lake", "", place, "an en-by swim lake waterside"},
    {M, "Fluss", "Flüsse", "river", "", place, "an en-by swim lake crossed waterside"},
    // Plants.
    {F, "Pflanze", "Pflanzen", "plant", "", thing, "watered upright"},
    {M, "Busch", "Büsche", "bush", "", outdoor, "mark watered"},
};

struct Head {
  Gender gender;
  const char* singular;
  const char* plural;
  const char* english;
  const char* english_plural;
  uint32_t domain;
  const char* tags;
};

/// Every modifier goes with every head; the English is "modifier head".
struct CompoundSet {
  std::vector<Fixed> modifiers;
  std::vector<Head> heads;
};

const std::vector<CompoundSet>& compound_sets() {
  static const std::vector<CompoundSet> sets = {
      {{{"Fußball", "soccer"},
        {"Basketball", "basketball"},
        {"Tennis", "tennis"},
        {"Hockey", "hockey"},
        {"Volleyball", "volleyball"},
        {"Rugby", "rugby"},
        {"Handball", "handball"}},
       {{M, "Spieler", "Spieler", "player", "", person, "human he"},
        {F, "Spielerin", "Spielerinnen", "player", "", person, "human she female"},
        {M, "Trainer", "Trainer", "coach", "", person, "human he"},
        {F, "Mannschaft", "Mannschaften", "team", "", no_domain, "collective"}}},
      {{{"Fußball", "soccer"}, {"Rugby", "rugby"}, {"Hockey", "hockey"}},
       {{M, "Platz", "Plätze", "field", "", place, "auf"}}},
      {{{"Tennis", "tennis"}, {"Basketball", "basketball"}, {"Volleyball", "volleyball"}},
       {{M, "Platz", "Plätze", "court", "", place, "auf"}}},
      {{{"Straßen", "street"}},
       {{M, "Musiker", "Musiker", "musician", "", person, "human he"},
        {M, "Künstler", "Künstler", "artist", "", person, "human he"},
        {M, "Verkäufer", "Verkäufer", "vendor", "", person, "human he"}}},
      {{{"Bau", "construction"}, {"Fabrik", "factory"}, {"Bahn", "railroad"}},
       {{M, "Arbeiter", "Arbeiter", "worker", "", person, "human he"}}},
      {{{"Bus", "bus"}, {"Taxi", "taxi"}, {"Lastwagen", "truck"}},
       {{M, "Fahrer", "Fahrer", "driver", "", person, "human he"}}},
      {{{"Gitarren", "guitar"},
        {"Klavier", "piano"},
        {"Geigen", "violin"},
        {"Ski", "ski"},
        {"Schwimm", "swimming"}},
       {{M, "Lehrer", "Lehrer", "teacher", "", person, "human he"}}},
      {{{"Holz", "wooden"}, {"Garten", "garden"}},
       {{M, "Tisch", "Tische", "table", "", furniture, "surface an desk coated built"},
        {M, "Stuhl", "Stühle", "chair", "", furniture, "surface seat coated built"},
        {F, "Bank", "Bänke", "bench", "", furniture, "seat coated built"},
        {M, "Zaun", "Zäune", "fence", "", outdoor, "mark leaned over coated built repaired"},
        {F, "Tür", "Türen", "door", "", furniture, "opened closed coated repaired"}}},
      {{{"Küchen", "kitchen"}},
       {{M, "Tisch", "Tische", "table", "", furniture, "surface an desk coated built"},
        {M, "Stuhl", "Stühle", "chair", "", furniture, "surface seat coated built"},
        {F, "Tür", "Türen", "door", "", furniture, "opened closed coated repaired"},
        {N, "Fenster", "Fenster", "window", "", furniture, "opened closed cleaned an"}}},
      {{{"Leder", "leather"}, {"Winter", "winter"}},
       {{F, "Jacke", "Jacken", "jacket", "", clothing, "wear inside puton buy hungup"},
        {M, "Mantel", "Mäntel", "coat", "", clothing, "wear inside puton buy hungup"},
        {M, "Schuh", "Schuhe", "shoe", "", clothing, "wearmany cleanmany"},
        {M, "Stiefel", "Stiefel", "boot", "", clothing, "wearmany cleanmany"},
        {M, "Handschuh", "Handschuhe", "glove", "", clothing, "wearmany"}}},
      {{{"Sommer", "summer"}, {"Abend", "evening"}},
       {{N, "Kleid", "Kleider", "dress", "", clothing, "wearshe insideshe buy hungup"}}},
      {{{"Stroh", "straw"}, {"Cowboy", "cowboy"}, {"Sonnen", "sun"}},
       {{M, "Hut", "Hüte", "hat", "", clothing, "wear with seton buy"}}},
      {{{"Fahrrad", "bicycle"}, {"Motorrad", "motorcycle"}, {"Football", "football"}, {"Schutz", "safety"}},
       {{M, "Helm", "Helme", "helmet", "", clothing, "wear with seton buy"}}},
      {{{"Apfel", "apple"},
        {"Schokoladen", "chocolate"},
        {"Erdbeer", "strawberry"},
        {"Geburtstags", "birthday"}},
       {{M, "Kuchen", "Kuchen", "cake", "", food, "eat buy cut bake food"}}},
      {{{"Tomaten", "tomato"}, {"Kartoffel", "potato"}, {"Gemüse", "vegetable"}, {"Nudel", "noodle"}},
       {{F, "Suppe", "Suppen", "soup", "", food, "eat cook"},
        {M, "Salat", "Salate", "salad", "", food, "eat buy"}}},
      {{{"Apfel", "apple"}, {"Orangen", "orange"}, {"Tomaten", "tomato"}},
       {{M, "Saft", "", "juice", "", drink, "drink massbuy +mass"}}},
      {{{"Buch", "book"}, {"Blumen", "flower"}, {"Schuh", "shoe"}, {"Spielzeug", "toy"}},
       {{M, "Laden", "Läden", "store", "", building, "mark in entered shop"}}},
      {{{"Spielzeug", "toy"}, {"Polizei", "police"}, {"Renn", "race"}},
       {{N, "Auto", "Autos", "car", "", vehicle, "mark repaired washed"}}},
      {{{"Blumen", "flower"}},
       {{M, "Topf", "Töpfe", "pot", "", thing, "thing upright"},
        {F, "Vase", "Vasen", "vase", "", thing, "thing upright"}}},
      {{{"Tisch", "table"}, {"Schreibtisch", "desk"}, {"Garten", "garden"}},
       {{F, "Lampe", "Lampen", "lamp", "", thing, "thing upright repaired switched"}}},
  };
  return sets;
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  while (!text.empty()) {
    const size_t end = text.find(separator);
    if (end != 0) parts.emplace_back(text.substr(0, end));
    if (end == std::string_view::npos) break;
    text.remove_prefix(end + 1);
  }
  return parts;
}

std::string regular_english_plural(const std::string& word) {
  const auto ends = [&](std::string_view suffix) { return word.ends_with(suffix); };
  if (ends("s") || ends("x") || ends("ch") || ends("sh")) return word + "es";
  if (ends("y") && !ends("ay") && !ends("ey") && !ends("oy")) return word.substr(0, word.size() - 1) + "ies";
  return word + "s";
}

Noun make_noun(const Row& row) {
  Noun noun{row.gender, row.singular, row.plural, row.english, row.english_plural, row.domain, {}, {}};
  if (noun.english_plural.empty()) noun.english_plural = regular_english_plural(noun.english);
  for (std::string& tag : split(row.tags, ' ')) {
    if (tag == "he" || tag == "she")
      noun.pronoun = tag[0];
    else if (tag[0] == '-')
      noun.oblique = tag.substr(1);
    else if (tag == "+adj")
      noun.adjectival = true;
    else if (tag == "+mass")
      noun.mass = true;
    else if (tag == "+pl")
      noun.plural_in_english = true;
    else
      noun.tags.push_back(std::move(tag));
  }
  return noun;
}

/// Heads begin with an ASCII letter, so no Unicode case mapping is needed.
std::string uncapitalised(std::string word) {
  if (!word.empty() && word[0] >= 'A' && word[0] <= 'Z') word[0] = static_cast<char>(word[0] - 'A' + 'a');
  return word;
}

}  // namespace

bool Noun::has(std::string_view tag) const { return std::find(tags.begin(), tags.end(), tag) != tags.end(); }

std::vector<const Noun*> Lexicon::with(std::string_view tags) const {
  const std::vector<std::string> wanted = split(tags, '|');
  std::vector<const Noun*> found;
  for (const Noun& noun : nouns_) {
    if (std::any_of(wanted.begin(), wanted.end(), [&](const std::string& tag) { return noun.has(tag); }))
      found.push_back(&noun);
  }
  return found;
}

const Lexicon& Lexicon::instance() {
  static const Lexicon lexicon;
  return lexicon;
}

Lexicon::Lexicon() {
  add_nouns();
  add_compounds();
  add_adjectives();
  add_verbs();
  add_phrases();
}

void Lexicon::add_nouns() {
  for (const Row& row : rows) nouns_.push_back(make_noun(row));
}

void Lexicon::add_compounds() {
  for (const CompoundSet& set : compound_sets()) {
    for (const Fixed& modifier : set.modifiers) {
      for (const Head& head : set.heads) {
        Noun noun = make_noun({head.gender, head.singular, head.plural, head.english, head.english_plural,
                               head.domain, head.tags});
        noun.singular = modifier.german + uncapitalised(noun.singular);
        if (!noun.plural.empty()) noun.plural = modifier.german + uncapitalised(noun.plural);
        const std::string before = noun.has("female") ? "female " : "";
        noun.english = before + modifier.english + " " + noun.english;
        noun.english_plural = before + modifier.english + " " + noun.english_plural;
        nouns_.push_back(std::move(noun));
      }
    }
  }
}

void Lexicon::add_adjectives() {
  adjectives = {
      // Sizes; their English depends on what they describe.
      {"klein", "little", person, 1},
      {"klein", "small", animal | thing | vehicle | food | place | building | furniture | outdoor | room, 1},
      {"groß", "tall", person, 1},
      {"groß", "big", animal | thing | vehicle | food | place | building | furniture | outdoor | room, 1},
      {"lang", "long", clothing | hair, 1},
      {"kurz", "short", hair, 1},
      {"dick", "fat", animal, 1},
      {"dick", "thick", clothing, 1},
      {"dünn", "thin", person | clothing, 1},
      {"hoh", "tall", building | outdoor, 1},
      {"schwer", "heavy", thing | furniture, 1},
      // States and looks.
      {"müd", "tired", person | animal, 2},
      {"glücklich", "happy", person, 2},
      {"fröhlich", "cheerful", person, 2},
      {"traurig", "sad", person, 2},
      {"freundlich", "friendly", person, 2},
      {"lachend", "laughing", person, 2},
      {"lächelnd", "smiling", person, 2},
      {"ernst", "serious", person, 2},
      {"elegant", "elegant", person | clothing, 2},
      {"stark", "strong", person | animal, 2},
      {"neugierig", "curious", person | animal, 2},
      {"hungrig", "hungry", person | animal, 2},
      {"nass", "wet", person | animal | clothing, 2},
      {"schmutzig", "dirty", clothing | thing | vehicle, 2},
      {"sauber", "clean", clothing | thing | vehicle, 2},
      {"kaputt", "broken", vehicle, 2},
      {"schön", "beautiful", clothing | thing | place | building | outdoor, 2},
      {"teur", "expensive", clothing | vehicle, 2},
      {"billig", "cheap", clothing, 2},
      {"warm", "warm", clothing | food, 2},
      {"bequem", "comfortable", furniture, 2},
      {"schnell", "fast", vehicle, 2},
      {"wild", "wild", animal, 2},
      {"zahm", "tame", animal, 2},
      {"flauschig", "fluffy", animal, 2},
      {"frisch", "fresh", food, 2},
      {"lecker", "delicious", food, 2},
      {"süß", "sweet", food | drink, 2},
      {"kalt", "cold", drink, 2},
      {"kühl", "cool", drink, 2},
      {"gut", "good", food | drink, 2},
      {"leer", "empty", place | room, 2},
      {"ruhig", "quiet", place | room, 2},
      {"dunkl", "dark", room, 2},
      {"hell", "bright", room, 2},
      {"belebt", "busy", place, 2},
      {"verlassen", "abandoned", building, 2},
      {"modern", "modern", building | furniture, 2},
      {"berühmt", "famous", building, 2},
      // Age.
      {"alt", "old", person | animal | clothing | thing | vehicle | building | furniture | outdoor, 3},
      {"jung", "young", person | animal, 3},
      {"neu", "new", clothing | thing | vehicle | furniture, 3},
      // Colours and patterns.
      {"blond", "blond", person | hair, 4},
      {"dunkelhaarig", "dark-haired", person, 4},
      {"weißhaarig", "white-haired", person, 4},
      {"rothaarig", "red-haired", person, 4},
      {"lockig", "curly", hair, 4},
      {"glatt", "straight", hair, 4},
      {"rot", "red", clothing | thing | vehicle | building | hair, 4},
      {"blau", "blue", clothing | thing | vehicle | furniture, 4},
      {"grün", "green", clothing | thing | vehicle | furniture, 4},
      {"gelb", "yellow", clothing | thing | vehicle | building, 4},
      {"schwarz", "black", animal | clothing | thing | vehicle | hair, 4},
      {"weiß", "white", animal | clothing | thing | vehicle | furniture | building, 4},
      {"braun", "brown", animal | clothing | thing | furniture | hair, 4},
      {"grau", "gray", animal | clothing | thing | vehicle | building | hair, 4},
      {"rosa", "pink", clothing | thing, 4, true},
      {"lila", "purple", clothing | thing, 4, true},
      {"bunt", "colorful", clothing | thing, 4},
      {"gestreift", "striped", clothing, 4},
      {"kariert", "plaid", clothing, 4},
      {"gefleckt", "spotted", animal, 4},
      {"hellblau", "light blue", clothing | vehicle, 4},
      {"hellgrün", "light green", clothing | vehicle, 4},
      {"hellbraun", "light brown", clothing | animal, 4},
      {"hellgrau", "light gray", clothing | vehicle, 4},
      {"dunkelblau", "dark blue", clothing | vehicle, 4},
      {"dunkelgrün", "dark green", clothing | vehicle, 4},
      {"dunkelbraun", "dark brown", clothing | animal, 4},
      {"dunkelgrau", "dark gray", clothing | vehicle, 4},
      {"dunkelrot", "dark red", clothing | vehicle, 4},
  };
  comparisons = {
      {"größer", "groß", "taller", "tall", person},
      {"größer", "groß", "bigger", "big", animal | vehicle},
      {"kleiner", "klein", "shorter", "short", person},
      {"kleiner", "klein", "smaller", "small", animal | vehicle},
      {"älter", "alt", "older", "old", person | animal | vehicle | building},
      {"jünger", "jung", "younger", "young", person | animal},
      {"schneller", "schnell", "faster", "fast", person | animal | vehicle},
      {"langsamer", "langsam", "slower", "slow", animal | vehicle},
      {"stärker", "stark", "stronger", "strong", person | animal},
      {"müder", "müde", "more tired", "tired", person},
      {"teurer", "teuer", "more expensive", "expensive", vehicle | clothing},
      {"höher", "hoch", "taller", "tall", building},
      {"schöner", "schön", "more beautiful", "beautiful", building | clothing},
      {"schmutziger", "schmutzig", "dirtier", "dirty", vehicle | clothing},
  };
}

void Lexicon::add_verbs() {
  intransitive = {
      {"arbeitet", "arbeiten", "", "working", "work", "", "fpta"},
      {"lacht", "lachen", "", "laughing", "laugh", "", "lqt"},
      {"lächelt", "lächeln", "", "smiling", "smile"},
      {"tanzt", "tanzen", "", "dancing", "dance", "", "hsta"},
      {"singt", "singen", "", "singing", "sing", "", "lqhta"},
      {"weint", "weinen", "", "crying", "cry", "", "lqa"},
      {"wartet", "warten", "", "waiting", "wait", "", "pta"},
      {"schläft", "schlafen", "", "sleeping", "sleep", "", "a"},
      {"kocht", "kochen", "", "cooking", "cook", "", "ta"},
      {"isst", "essen", "", "eating", "eat", "", "fsta"},
      {"spielt", "spielen", "", "playing", "play", "", "qhta"},
      {"badet", "baden", "", "bathing", "bathe", "", "ta"},
      {"joggt", "joggen", "", "jogging", "jog", "", "sfta"},
      {"trainiert", "trainieren", "", "exercising", "exercise", "", "ta"},
      {"angelt", "angeln", "", "fishing", "fish", "", "pta"},
      {"telefoniert", "telefonieren", "", "talking on the phone", "talk on the phone", "", "lq"},
      {"raucht", "rauchen", "", "smoking", "smoke", "", "ta"},
      {"klatscht", "klatschen", "", "clapping", "clap", "", "lh"},
      {"jubelt", "jubeln", "", "cheering", "cheer", "", "l"},
      {"frühstückt", "frühstücken", "", "having breakfast", "have breakfast", "", "ta"},
      {"zeltet", "zelten", "", "camping", "camp", "", "ta"},
      {"lernt", "lernen", "", "studying", "study", "", "qta"},
      {"betet", "beten", "", "praying", "pray", "", "qta"},
      {"musiziert", "musizieren", "", "making music", "make music", "", "ta"},
      {"sieht", "sehen", "fern", "watching television", "watch television", "", "ta"},
      {"schläft", "schlafen", "ein", "falling asleep", "fall asleep", "", "fs"},
      {"steht", "stehen", "auf", "getting up", "get up", "", "sf"},
      {"wäscht", "waschen", "ab", "doing the dishes", "do the dishes", "", "ta"},
      {"kauft", "kaufen", "ein", "shopping", "shop", "", "ta"},
      {"ruht", "ruhen", "aus", "resting", "rest", "", "", "", "", true},
      {"sonnt", "sonnen", "", "sunbathing", "sunbathe", "", "", "", "", true},
      {"verbeugt", "verbeugen", "", "bowing", "bow", "", "s", "", "", true},
      {"dreht", "drehen", "um", "turning around", "turn around", "", "sf", "", "", true},
  };
  animal_intransitive = {
      {"schläft", "schlafen", "", "sleeping", "sleep", "", "a"},
      {"frisst", "fressen", "", "eating", "eat", "", "sfa"},
      {"trinkt", "trinken", "", "drinking", "drink", "", "s"},
      {"spielt", "spielen", "", "playing", "play", "", "ta"},
      {"wartet", "warten", "", "waiting", "wait", "", "pa"},
      {"gräbt", "graben", "", "digging", "dig", "", "f"},
      {"rennt", "rennen", "", "running", "run", "", "f"},
      {"ruht", "ruhen", "aus", "resting", "rest", "", "", "", "", true},
      {"dreht", "drehen", "um", "turning around", "turn around", "", "sf", "", "", true},
      {"schläft", "schlafen", "ein", "falling asleep", "fall asleep", "", "s"},
  };
  reciprocal = {
      {"", "unterhalten", "", "talking", "talk", "", "lq", "", "", true},
      {"", "streiten", "", "arguing", "argue", "", "l", "", "", true},
      {"", "umarmen", "", "hugging", "hug", "", "", "", "", true},
      {"", "küssen", "", "kissing", "kiss", "", "", "", "", true},
      {"", "begrüßen", "", "greeting each other", "greet each other", "", "", "", "", true},
  };
  transitive = {
      {"liest", "lesen", "", "reading", "read", "read", "q", "gelesen", "read"},
      {"schreibt", "schreiben", "", "writing", "write", "write", "s", "geschrieben", "written"},
      {"isst", "essen", "", "eating", "eat", "eat|masseat", "fs", "gegessen", "eaten"},
      {"trinkt", "trinken", "", "drinking", "drink", "drink", "fs"},
      {"kauft", "kaufen", "", "buying", "buy", "buy|massbuy|thing", "", "gekauft", "bought"},
      {"verkauft", "verkaufen", "", "selling", "sell", "buy|massbuy|thing", "", "verkauft", "sold"},
      {"backt", "backen", "", "baking", "bake", "bake", "", "gebacken", "baked"},
      {"kocht", "kochen", "", "cooking", "cook", "cook", "", "gekocht", "cooked"},
      {"schneidet", "schneiden", "", "cutting", "cut", "cut|masseat", "cfs", "geschnitten", "cut"},
      {"trägt", "tragen", "", "carrying", "carry", "thing|box", "cs", "getragen", "carried"},
      {"hält", "halten", "", "holding", "hold", "thing|tool|infant", "c", "gehalten", "held"},
      {"sucht", "suchen", "", "looking for", "look for", "thing|tool", "p", "", ""},
      {"zeichnet", "zeichnen", "", "drawing", "draw", "drawn|animal", "sf", "gezeichnet", "drawn"},
      {"repariert", "reparieren", "", "repairing", "repair", "repaired", "cp", "repariert", "repaired"},
      {"wäscht", "waschen", "", "washing", "wash", "washed", "cf", "gewaschen", "washed"},
      {"putzt", "putzen", "", "cleaning", "clean", "cleaned", "f", "geputzt", "cleaned"},
      {"streicht", "streichen", "", "painting", "paint", "coated", "c", "gestrichen", "painted"},
      {"malt", "malen", "", "painting", "paint", "painted", "s", "gemalt", "painted"},
      {"baut", "bauen", "", "building", "build", "built", "", "gebaut", "built"},
      {"öffnet", "öffnen", "", "opening", "open", "opened", "cfs", "geöffnet", "opened"},
      {"schließt", "schließen", "", "closing", "close", "closed", "cfs", "geschlossen", "closed"},
      {"wirft", "werfen", "", "throwing", "throw", "thrown", ""},
      {"fängt", "fangen", "", "catching", "catch", "caught", "", "gefangen", "caught"},
      {"schiebt", "schieben", "", "pushing", "push", "pushed", "sc", "geschoben", "pushed"},
      {"zieht", "ziehen", "", "pulling", "pull", "pulled", "sc", "gezogen", "pulled"},
      {"fährt", "fahren", "", "driving", "drive", "driven", "csf"},
      {"fährt", "fahren", "", "riding", "ride", "cycled", "csf"},
      {"streichelt", "streicheln", "", "petting", "pet", "pet", "c", "gestreichelt", "petted"},
      {"füttert", "füttern", "", "feeding", "feed", "animal|infant", "cp", "gefüttert", "fed"},
      {"beobachtet", "beobachten", "", "observing", "observe", "animal|human", "q", "beobachtet", "observed"},
      {"fotografiert", "fotografieren", "", "photographing", "photograph", "animal|human|view", "",
       "fotografiert", "photographed"},
      {"umarmt", "umarmen", "", "hugging", "hug", "human|kin", "h", "umarmt", "hugged"},
      {"begrüßt", "begrüßen", "", "greeting", "greet", "human|kin", "h", "begrüßt", "greeted"},
      {"besucht", "besuchen", "", "visiting", "visit", "kin", "", "besucht", "visited"},
      {"tröstet", "trösten", "", "comforting", "comfort", "young|kin|infant", "p", "getröstet", "comforted"},
      {"gießt", "gießen", "", "watering", "water", "watered", "c", "gegossen", "watered"},
      {"pflückt", "pflücken", "", "picking", "pick", "picked", "cf", "gepflückt", "picked"},
      {"fegt", "fegen", "", "sweeping", "sweep", "swept", "sf", "gefegt", "swept"},
      {"betritt", "betreten", "", "entering", "enter", "entered", "csf"},
      {"verlässt", "verlassen", "", "leaving", "leave", "entered", "fs"},
      {"überquert", "überqueren", "", "crossing", "cross", "crossed", "csf"},
      {"hebt", "heben", "auf", "picking up", "pick up", "thing", "cfs", "aufgehoben", "picked up"},
      {"hängt", "hängen", "auf", "hanging up", "hang up", "hungup", "c", "aufgehängt", "hung up"},
      {"zieht", "ziehen", "an", "putting on", "put on", "puton", "fs"},
      {"setzt", "setzen", "auf", "putting on", "put on", "seton", "fs"},
      {"zieht", "ziehen", "aus", "taking off", "take off", "puton", "fs"},
      {"setzt", "setzen", "ab", "taking off", "take off", "seton", "fs"},
      {"probiert", "probieren", "an", "trying on", "try on", "puton", ""},
      {"räumt", "räumen", "auf", "tidying up", "tidy up", "tidied", "f", "aufgeräumt", "tidied up"},
      {"baut", "bauen", "auf", "setting up", "set up", "setup", "", "aufgebaut", "set up"},
      {"packt", "packen", "aus", "unpacking", "unpack", "unpack", "cfs", "ausgepackt", "unpacked"},
      {"schaltet", "schalten", "ein", "turning on", "turn on", "switched", "", "eingeschaltet", "turned on"},
      {"schaltet", "schalten", "aus", "turning off", "turn off", "switched", "", "ausgeschaltet",
       "turned off"},
      {"ruft", "rufen", "an", "calling", "call", "kin", "", "angerufen", "called"},
      {"holt", "holen", "ab", "picking up", "pick up", "kin", "", "abgeholt", "picked up"},
      {"lädt", "laden", "ein", "inviting", "invite", "kin", "", "eingeladen", "invited"},
      {"sieht", "sehen", "an", "looking at", "look at", "view", "", "", "", true},
  };
  animal_transitive = {
      {"jagt", "jagen", "", "chasing", "chase", "chased", "", "gejagt", "chased"},
      {"beobachtet", "beobachten", "", "observing", "observe", "animal|human", "qp", "beobachtet",
       "observed"},
      {"frisst", "fressen", "", "eating", "eat", "eat|masseat", "fs", "gefressen", "eaten"},
      {"trägt", "tragen", "", "carrying", "carry", "fetch", "c", "getragen", "carried"},
      {"sucht", "suchen", "", "looking for", "look for", "fetch|chased", "", "", ""},
      {"überquert", "überqueren", "", "crossing", "cross", "crossed", "fs"},
      {"zieht", "ziehen", "", "pulling", "pull", "pulled", "s", "gezogen", "pulled"},
  };
  dative = {
      {"hilft", "helfen", "", "helping", "help", "human|kin"},
      {"folgt", "folgen", "", "following", "follow", "human|animal", "sq"},
      {"winkt", "winken", "", "waving to", "wave to", "human|kin"},
      {"dankt", "danken", "", "thanking", "thank", "human|kin"},
      {"gratuliert", "gratulieren", "", "congratulating", "congratulate", "human|kin"},
      {"antwortet", "antworten", "", "answering", "answer", "human|kin", "qp"},
      {"schaut", "schauen", "zu", "watching", "watch", "human|animal", "qp"},
      {"hört", "hören", "zu", "listening to", "listen to", "human|kin", "qp"},
      {"läuft", "laufen", "nach", "running after", "run after", "human|animal", ""},
  };
  ditransitive = {
      {"gibt", "geben", "", "giving", "give", "thing|food"},
      {"zeigt", "zeigen", "", "showing", "show", "thing|view|repaired"},
      {"bringt", "bringen", "", "bringing", "bring", "thing|food|tool"},
      {"kauft", "kaufen", "", "buying", "buy", "buy|massbuy|toy"},
      {"verkauft", "verkaufen", "", "selling", "sell", "buy|massbuy"},
      {"reicht", "reichen", "", "handing", "hand", "tool|thing|food"},
      {"schreibt", "schreiben", "", "writing", "write", "write"},
      {"erzählt", "erzählen", "", "telling", "tell", "story"},
      {"liest", "lesen", "vor", "reading", "read", "told"},
      {"wirft", "werfen", "zu", "throwing", "throw", "thrown"},
  };
  // `objects` here: the posture, which decides where one can be.
  position = {
      {"sitzt", "sitzen", "", "sitting", "sit", "sit", "ta"},
      {"steht", "stehen", "", "standing", "stand", "stand", "a"},
      {"liegt", "liegen", "", "lying", "lie", "lie", "a"},
      {"kniet", "knien", "", "kneeling", "kneel", "kneel", ""},
      {"wartet", "warten", "", "waiting", "wait", "stand", "pa"},
  };
  motion = {
      {"geht", "gehen", "", "walking", "walk", "", "sfta"},
      {"rennt", "rennen", "", "running", "run", "", "fta"},
      {"schleicht", "schleichen", "", "sneaking", "sneak", "", "qc"},
      {"kriecht", "kriechen", "", "crawling", "crawl", "", "s"},
  };
  caused_motion = {
      {"stellt", "stellen", "", "putting", "put", "upright", "c"},
      {"legt", "legen", "", "putting", "put", "flat", "c"},
      {"hängt", "hängen", "", "hanging", "hang", "hung", "c"},
      {"wirft", "werfen", "", "throwing", "throw", "thrown", ""},
      {"trägt", "tragen", "", "carrying", "carry", "thing", "c"},
  };
  stative = {
      {"sieht", "sehen", "", "sees", "see"},
      {"merkt", "merken", "", "notices", "notice"},
      {"glaubt", "glauben", "", "believes", "believe"},
      {"weiß", "wissen", "", "knows", "know"},
      {"hofft", "hoffen", "", "hopes", "hope"},
      {"sagt", "sagen", "", "says", "say"},
  };
  // `objects` here: the German noun phrase and, after "=", the English noun.
  body = {
      {"wäscht", "waschen", "", "washing", "wash", "die Hände=hands"},
      {"wäscht", "waschen", "", "washing", "wash", "das Gesicht=face"},
      {"wäscht", "waschen", "", "washing", "wash", "die Haare=hair"},
      {"putzt", "putzen", "", "brushing", "brush", "die Zähne=teeth"},
      {"kämmt", "kämmen", "", "combing", "comb", "die Haare=hair"},
      {"trocknet", "trocknen", "", "drying", "dry", "die Hände=hands"},
      {"trocknet", "trocknen", "", "drying", "dry", "die Haare=hair"},
      {"reibt", "reiben", "", "rubbing", "rub", "die Augen=eyes"},
      {"zieht", "ziehen", "an", "putting on", "put on", "die Schuhe=shoes"},
      {"zieht", "ziehen", "aus", "taking off", "take off", "die Schuhe=shoes"},
      {"zieht", "ziehen", "an", "putting on", "put on", "die Handschuhe=gloves"},
  };
  prepositional = {
      {{"wartet", "warten", "", "waiting", "wait", "awaited|human", "p"}, "auf", false, "for", true},
      {{"zeigt", "zeigen", "", "pointing", "point", "animal|mark|view"}, "auf", false, "at", false},
      {{"spricht", "sprechen", "", "speaking", "speak", "human|kin", "qls"}, "mit", true, "with", false},
      {{"tanzt", "tanzen", "", "dancing", "dance", "human|kin", "s"}, "mit", true, "with", false},
      {{"spielt", "spielen", "", "playing", "play", "animal|toy|young"}, "mit", true, "with", true},
      {{"lacht", "lachen", "", "laughing", "laugh", "human|animal", "lq"}, "über", false, "at", false},
      {{"springt", "springen", "", "jumping", "jump", "over", ""}, "über", false, "over", true},
      {{"springt", "springen", "", "jumping", "jump", "swim", ""}, "in", false, "into", true},
      {{"schwimmt", "schwimmen", "", "swimming", "swim", "lake", "s"}, "in", true, "in", true},
      {{"klettert", "klettern", "", "climbing", "climb", "climbed", "csf"}, "auf", false, "", false},
      {{"klettert", "klettern", "", "climbing", "climb", "over", "cs"}, "über", false, "over", false},
      {{"reitet", "reiten", "", "riding", "ride", "ridden", "s"}, "auf", true, "", false},
      {{"rudert", "rudern", "", "rowing", "row", "rowed", "s"}, "in", true, "in", false},
      {{"lehnt", "lehnen", "", "leaning", "lean", "leaned", "", "", "", true}, "an", false, "against", false},
      {{"versteckt", "verstecken", "", "hiding", "hide", "mark", "", "", "", true},
       "hinter",
       true,
       "behind",
       true},
      {{"kümmert", "kümmern", "", "taking care of", "take care of", "animal|kin|infant", "", "", "", true},
       "um",
       false,
       "",
       false},
      {{"unterhält", "unterhalten", "", "talking", "talk", "human|kin", "l", "", "", true},
       "mit",
       true,
       "to",
       false},
      {{"setzt", "setzen", "", "sitting down", "sit down", "seat", "s", "", "", true},
       "auf",
       false,
       "on",
       true},
      {{"geht", "gehen", "", "walking", "walk", "through", "s"}, "durch", false, "through", true},
      {{"rennt", "rennen", "", "running", "run", "through", ""}, "durch", false, "through", true},
      {{"rennt", "rennen", "", "running", "run", "mark", ""}, "um", false, "around", true},
      {{"kommt", "kommen", "", "coming", "come", "entered", "s"}, "aus", true, "out of", true},
      {{"steigt", "steigen", "ein", "getting", "get", "boarded", "sc"}, "in", false, "into", false},
      {{"steigt", "steigen", "aus", "getting", "get", "boarded", "sc"}, "aus", true, "out of", false},
      {{"geht", "gehen", "vorbei", "walking", "walk", "mark", "sf"}, "an", true, "past", true},
      {{"fährt", "fahren", "vorbei", "driving", "drive", "mark", "sf"}, "an", true, "past", false},
      {{"träumt", "träumen", "", "dreaming", "dream", "animal|kin", ""}, "von", true, "of", false},
      {{"blickt", "blicken", "", "looking", "look", "windows", ""}, "aus", true, "out of", true},
  };
  bare = {
      {"spielt", "spielen", "Fußball", "playing soccer", "play soccer"},
      {"spielt", "spielen", "Basketball", "playing basketball", "play basketball"},
      {"spielt", "spielen", "Tennis", "playing tennis", "play tennis"},
      {"spielt", "spielen", "Volleyball", "playing volleyball", "play volleyball"},
      {"spielt", "spielen", "Hockey", "playing hockey", "play hockey"},
      {"spielt", "spielen", "Schach", "playing chess", "play chess"},
      {"spielt", "spielen", "Karten", "playing cards", "play cards"},
      {"spielt", "spielen", "Verstecken", "playing hide and seek", "play hide and seek"},
      {"spielt", "spielen", "Gitarre", "playing the guitar", "play the guitar"},
      {"spielt", "spielen", "Klavier", "playing the piano", "play the piano"},
      {"spielt", "spielen", "Geige", "playing the violin", "play the violin"},
      {"spielt", "spielen", "Flöte", "playing the flute", "play the flute"},
      {"spielt", "spielen", "Trompete", "playing the trumpet", "play the trumpet"},
      {"spielt", "spielen", "Schlagzeug", "playing the drums", "play the drums"},
      {"fährt", "fahren", "Fahrrad", "riding a bike", "ride a bike"},
      {"fährt", "fahren", "Ski", "skiing", "ski"},
      {"fährt", "fahren", "Skateboard", "skateboarding", "skateboard"},
      {"läuft", "laufen", "Schlittschuh", "ice skating", "ice skate"},
      {"isst", "essen", "Eis", "eating ice cream", "eat ice cream"},
      {"hört", "hören", "Musik", "listening to music", "listen to music"},
      {"macht", "machen", "Yoga", "doing yoga", "do yoga"},
      {"macht", "machen", "Fotos", "taking pictures", "take pictures"},
      {"macht", "machen", "Hausaufgaben", "doing homework", "do homework"},
      {"geht", "gehen", "spazieren", "going for a walk", "go for a walk"},
      {"geht", "gehen", "schwimmen", "going swimming", "go swimming"},
  };
}

void Lexicon::add_phrases() {
  adverbs = {{'l', "laut", "loudly"},        {'q', "leise", "quietly"},      {'h', "fröhlich", "cheerfully"},
             {'s', "langsam", "slowly"},     {'f', "schnell", "quickly"},    {'c', "vorsichtig", "carefully"},
             {'p', "geduldig", "patiently"}, {'t', "gemeinsam", "together"}, {'a', "allein", "alone"}};
  times = {{"am Morgen", "in the morning"},
           {"am Nachmittag", "in the afternoon"},
           {"am Abend", "in the evening"},
           {"in der Nacht", "at night"},
           {"am Mittag", "at noon"},
           {"am frühen Morgen", "in the early morning"},
           {"am späten Abend", "late in the evening"},
           {"bei Sonnenuntergang", "at sunset"},
           {"bei Regen", "in the rain"},
           {"bei schönem Wetter", "in nice weather"},
           {"bei starkem Wind", "in strong wind"},
           {"im Sommer", "in summer"},
           {"im Winter", "in winter"},
           {"im Herbst", "in fall"},
           {"im Frühling", "in spring"},
           {"am Montag", "on Monday"},
           {"am Dienstag", "on Tuesday"},
           {"am Mittwoch", "on Wednesday"},
           {"am Donnerstag", "on Thursday"},
           {"am Freitag", "on Friday"},
           {"am Samstag", "on Saturday"},
           {"am Sonntag", "on Sunday"},
           {"am Wochenende", "on the weekend"},
           {"im Mai", "in May"},
           {"im Juli", "in July"},
           {"im Oktober", "in October"},
           {"im Dezember", "in December"},
           {"vor dem Frühstück", "before breakfast"},
           {"nach dem Essen", "after the meal"},
           {"nach der Arbeit", "after work"},
           {"vor dem Unterricht", "before class"},
           {"nach dem Training", "after practice"}};
  weather_clauses = {{"es regnet", "it is raining"},
                     {"es schneit", "it is snowing"},
                     {"es kalt ist", "it is cold"},
                     {"es warm ist", "it is warm"},
                     {"es dunkel wird", "it is getting dark"},
                     {"die Sonne scheint", "the sun is shining"},
                     {"der Wind weht", "the wind is blowing"},
                     {"das Wetter schön ist", "the weather is nice"},
                     {"das Wetter schlecht ist", "the weather is bad"}};
  occasions = {{"während des Spiels", "during the game"},     {"während des Konzerts", "during the concert"},
               {"während der Pause", "during the break"},     {"während der Hochzeit", "during the wedding"},
               {"während des Festes", "during the festival"}, {"während des Rennens", "during the race"},
               {"während der Reise", "during the trip"},      {"wegen des Regens", "because of the rain"},
               {"wegen der Hitze", "because of the heat"},    {"wegen des Schnees", "because of the snow"},
               {"wegen des Lärms", "because of the noise"},   {"trotz des Regens", "despite the rain"},
               {"trotz der Kälte", "despite the cold"},       {"trotz des Windes", "despite the wind"}};
  states = {{"müde", "tired"},   {"hungrig", "hungry"}, {"durstig", "thirsty"},   {"glücklich", "happy"},
            {"krank", "sick"},   {"traurig", "sad"},    {"neugierig", "curious"}, {"nervös", "nervous"},
            {"allein", "alone"}, {"nass", "wet"}};
  numbers = {{"zwei", "two"},     {"drei", "three"}, {"vier", "four"}, {"fünf", "five"}, {"sechs", "six"},
             {"sieben", "seven"}, {"acht", "eight"}, {"neun", "nine"}, {"zehn", "ten"}};
  day_adjectives = {{"sonnigen", "sunny"},     {"kalten", "cold"},    {"warmen", "warm"},
                    {"regnerischen", "rainy"}, {"windigen", "windy"}, {"schönen", "beautiful"},
                    {"heißen", "hot"},         {"nebligen", "foggy"}};
  days = {{"Tag", "day"},           {"Morgen", "morning"},       {"Nachmittag", "afternoon"},
          {"Abend", "evening"},     {"Sommertag", "summer day"}, {"Wintertag", "winter day"},
          {"Herbsttag", "fall day"}};
  predicates = {{"alt", "old"},     {"sehr alt", "very old"}, {"neu", "new"},
                {"klein", "small"}, {"groß", "big"},          {"schön", "beautiful"},
                {"grün", "green"},  {"weiß", "white"},        {"nicht sehr groß", "not very big"}};
  wholes = {{"part", "whole"}, {"enginepart", "machine"}, {"wheelpart", "wheels"}};
}

}  // namespace remnant::app::captions
